"""Small charts for the page, as SVG that stands in the page itself."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from lightning_sgd.report.files import Series
    from lightning_sgd.report.sections import Panel

FEW = 8
"""So many curves have a name each in the legend; of more only the first and the last."""

WIDTH, HEIGHT = 4.6, 2.7
"""In inches; on a phone a chart is shown almost at this size."""

TYPES = {".svg": "image/svg+xml", ".png": "image/png"}


def draw(panel: Panel) -> str:
    """Draw a chart over the optimizer steps, as the address of an image.

    Args:
        panel: What to draw.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, HEIGHT))
    # As a constrained layout would find, for half of the time.
    axes = figure.subplots(gridspec_kw={"left": 0.14, "right": 0.97, "bottom": 0.16, "top": 0.9})
    _draw_curves(axes, panel)
    if panel.main and panel.error is not None:
        _draw_band(axes, panel.curves[panel.main], panel.error)
    axes.set_title(panel.title, loc="left", fontsize="medium")
    axes.set_xlabel("optimizer step", fontsize="small")
    axes.tick_params(labelsize="small")
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if len(panel.curves) > 1:
        axes.legend(frameon=False, fontsize=7)
    return _address(figure)


def _draw_curves(axes: Axes, panel: Panel) -> None:
    rest = [name for name in panel.curves if name != panel.main]
    for name, colour, label in _styles(rest):
        series = panel.curves[name]
        marker = "." if len(series.values) == 1 else ""
        axes.plot(
            series.steps, series.values, color=colour, linewidth=0.9, marker=marker, label=label
        )
    if panel.main:
        series = panel.curves[panel.main]
        is_short = len(series.values) <= 30
        label = "mean" if rest else panel.main
        axes.plot(
            series.steps,
            series.values,
            color="#004488",
            linewidth=1.8,
            marker="o" if is_short else "",
            markersize=3,
            label=label,
        )


def _styles(names: Sequence[str]) -> Iterator[tuple[str, object, str]]:
    """Choose colours from dark to bright, in the order of the names; the bright end of the map is too pale."""
    from matplotlib import colormaps

    colours = colormaps["viridis"]
    for index, name in enumerate(names):
        place = 0.9 * index / max(1, len(names) - 1)
        is_named = len(names) <= FEW or index in (0, len(names) - 1)
        yield name, colours(place), name if is_named else "_nolegend_"


def _draw_band(axes: Axes, centre: Series, error: Series) -> None:
    widths = dict(zip(error.steps, error.values, strict=True))
    known = [
        (step, value - widths[step], value + widths[step])
        for step, value in zip(centre.steps, centre.values, strict=True)
        if math.isfinite(widths.get(step, math.nan))
    ]
    if known:
        steps, low, high = zip(*known, strict=True)
        axes.fill_between(steps, low, high, color="#004488", alpha=0.15, linewidth=0)


def _address(figure: Figure) -> str:
    from matplotlib import rc_context

    file = io.BytesIO()
    # Letters as letters: half of the size. Without a date, and with a salt, equal runs give equal pages.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "lightning-sgd"}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    return _data(file.getvalue(), TYPES[".svg"])


def embedded(file: Path) -> str | None:
    """Embed a figure that a plug-in has saved, as the address of an image; ``None`` if the file is gone.

    Args:
        file: SVG or PNG.
    """
    if file.suffix not in TYPES or not file.is_file():
        return None
    return _data(file.read_bytes(), TYPES[file.suffix])


def _data(content: bytes, media_type: str) -> str:
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"
