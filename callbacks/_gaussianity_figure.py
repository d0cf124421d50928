"""The figure of a Gaussianity monitor: quantiles at the last look, and the share of rejected directions over time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from lightning_sgd.callbacks._gaussianity_history import GaussianityHistory

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STEM = "gaussianity"
CURVES = {
    "random": ("on random directions", "#0072B2", "o-", ""),
    "coordinate": ("by coordinate", "#D55E00", "s--", "coordinate_"),
}
"""By family: its name, colour and line, and how its keys begin."""


def draw_gaussianity(history: GaussianityHistory, level: float) -> Figure:
    """Draw two panels: a QQ plot, and shares over steps with the limits that Gaussian noise keeps.

    Args:
        history: What was found.
        level: Share that is rejected of Gaussian noise, on average.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for family, (name, color, line, prefix) in CURVES.items():
        _draw_quantiles(left, history.quantiles.get(family, ()), name, color, line[0])
        for quantity, style in (("rejected", line), ("limit", ":")):
            series = history.values.get(f"{prefix}{quantity}", [])
            right.plot(history.times[: len(series)], series, style, color=color, markersize=3)
    left.axline((0, 0), slope=1, color="#999999", linewidth=0.8)
    left.set(xlabel="normal quantile", ylabel="mean quantile of the noise", title="last look")
    right.axhline(level, color="#999999", linewidth=0.8)
    right.set(xlabel="optimizer step", ylabel="share of directions rejected", ylim=(-0.03, 1.03))
    right.set_title("dotted: limit for Gaussian noise")
    left.legend(fontsize="small", loc="upper left")
    return figure


def _draw_quantiles(
    axes: Axes, quantiles: Sequence[float], name: str, color: str, marker: str
) -> None:
    num = len(quantiles)
    places = (torch.arange(1, num + 1, dtype=torch.float64) - 0.375) / (num + 0.25)
    scores = torch.special.ndtri(places).tolist()
    axes.plot(scores, quantiles, marker, color=color, markersize=3, label=name)
