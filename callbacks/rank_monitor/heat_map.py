"""Draw the heat map of a rank monitor: weight matrices by time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STEM = "rank_heat_map"
MAX_LABELS = 60
"""matplotlib lays out every label anew: with 3000 of them a figure took a minute."""
MAX_HEIGHT = 40.0
"""Inches. The PNG has 150 dots per inch, and no renderer takes more than 65,536 dots."""


def draw_heat_map(title: str, names: Sequence[str], times: Sequence[int], shares: Tensor) -> Figure:
    """Draw one row per matrix, from 0 (dark) to full rank (bright).

    Of many matrices only every second, third, … is named, so that there are at most ``MAX_LABELS`` labels.

    Args:
        title: What the colours show.
        names: Names of the matrices, first on top.
        times: Optimizer steps at which the values were taken.
        shares: Rank relative to the short side of the matrix, shape (times, matrices).
    """
    from matplotlib.figure import Figure

    height = min(1.2 + 0.28 * max(2, len(names)), MAX_HEIGHT)
    figure = Figure(figsize=(7.0, height), layout="constrained")
    axes = figure.subplots()
    # A look fills the time until the next one. The width of the last one is the mean of the others.
    edges = [*times, times[-1] + max(1, (times[-1] - times[0]) // max(1, len(times) - 1))]
    rows = [index - 0.5 for index in range(len(names) + 1)]
    image = axes.pcolormesh(edges, rows, shares.T.numpy(), cmap="cividis", vmin=0, vmax=1)
    labelled = range(0, len(names), -(-len(names) // MAX_LABELS))
    axes.set_yticks(list(labelled), [names[index] for index in labelled])
    axes.invert_yaxis()
    axes.set_xlabel("optimizer step")
    axes.set_title(title, loc="left", fontsize="medium")
    figure.colorbar(image, ax=axes, label="share of full rank")
    return figure
