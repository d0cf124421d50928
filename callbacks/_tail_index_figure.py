"""The figure of a tail-index monitor: index over time, and the stability profiles at the last look."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STEM = "tail_index"
CURVES = {
    "coordinate": ("by coordinate", "#0072B2", "o-"),
    "pooled": ("pooled, as in the paper", "#D55E00", "s--"),
    "pooled_shuffled": ("pooled, shuffled", "#555555", "^:"),
}
"""By quantity: its name, colour and line."""


def draw_tail_index(
    times: Sequence[int],
    values: Mapping[str, Sequence[float]],
    profiles: Mapping[str, Sequence[float]],
) -> Figure:
    """Draw two panels: index over steps, and local index over the length of sums.

    Args:
        times: Steps at which was looked.
        values: By quantity, one number for each time.
        profiles: By quantity, the local indices between sums of 1, 2, 4, … samples.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for key, series in values.items():
        name, color, line = CURVES[key]
        left.plot(times, series, line, color=color, label=name, markersize=3)
    for key, profile in profiles.items():
        name, color, line = CURVES[key]
        right.plot([2**j for j in range(len(profile))], profile, line, color=color, label=name)
    left.set(xlabel="optimizer step", ylabel="tail index α", ylim=(0, 3))
    right.set(xlabel="samples per sum", xscale="log", title="stability profile at the last look")
    for axes in (left, right):
        _mark_gaussian(axes)
    left.legend(fontsize="small", loc="lower left")
    return figure


def _mark_gaussian(axes: Axes) -> None:
    axes.axhline(2.0, color="#999999", linewidth=0.8)
    axes.text(0.99, 2.03, "Gaussian", transform=axes.get_yaxis_transform(), ha="right", fontsize=7)
