"""The figure of a monitor of the critical batch size: noise scale over time, and what a batch size costs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STEM = "critical_batch_size"
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#555555"


def draw_batch_sizes(
    times: Sequence[int], values: Mapping[str, Sequence[float]], batch_size: int | None
) -> Figure:
    """Draw two panels: the noise scale over steps, and the price of a batch size in steps and in samples.

    Args:
        times: Steps at which was looked.
        values: ``noise_scale``, ``low`` and ``high``, one number for each time.
        batch_size: Samples of a step; ``None`` where nobody knows.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    found = [value for value in values.get("noise_scale", ()) if 0 < value < math.inf]
    if found:
        _draw_times(left, times, values, max(found))
        _draw_price(right, found[-1], batch_size)
    if batch_size is not None:
        left.axhline(batch_size, color=GREY, linestyle=":", label="batch of a step")
    left.set(xlabel="optimizer step", ylabel="samples", yscale="log", title="noise scale")
    if left.lines:
        left.legend(fontsize="small", loc="upper right")
    return figure


def _draw_times(
    axes: Axes, times: Sequence[int], values: Mapping[str, Sequence[float]], largest: float
) -> None:
    low, high = ([min(max(v, 0.1), 100 * largest) for v in values[key]] for key in ("low", "high"))
    axes.fill_between(list(times), low, high, color=BLUE, alpha=0.15, label="two standard errors")
    shown = [value if 0 < value < math.inf else math.nan for value in values["noise_scale"]]
    axes.plot(times, shown, "o-", color=BLUE, markersize=3)


def _draw_price(axes: Axes, scale: float, batch_size: int | None) -> None:
    sizes = [scale * 2 ** (k / 4) for k in range(-20, 21)]
    axes.loglog(sizes, [1 + scale / size for size in sizes], color=BLUE, label="steps")
    axes.loglog(sizes, [1 + size / scale for size in sizes], color=ORANGE, label="samples")
    axes.axvline(scale, color=BLUE, linewidth=0.8, linestyle="--")
    if batch_size is not None:
        axes.axvline(batch_size, color=GREY, linestyle=":")
    axes.set(xlabel="batch size", ylabel="times the least", title="price, after the last look")
    axes.legend(fontsize="small", loc="upper center")
