"""The plot of a run: losses above, accuracies below."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from lightning_sgd.report.summary import is_accuracy, is_loss, is_test, moving_average, summarise

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes

    from lightning_sgd.report.files import Series

PANELS: dict[str, Callable[[str], bool]] = {"loss": is_loss, "accuracy": is_accuracy}
COLOURS = {"train": "#6699cc", "val": "#004488", "test": "#bb5566"}
FEW = 40  # so many points are marked one by one; more are the noisy losses of single batches, and are averaged


def can_plot(metrics: Mapping[str, Series]) -> bool:
    """Tell whether there is a loss or an accuracy.

    Args:
        metrics: All metrics of a run.
    """
    return any(belongs(name) for name in metrics for belongs in PANELS.values())


def save_plot(metrics: Mapping[str, Series], title: str, path: Path) -> None:
    """Draw losses and accuracies over the optimizer steps.

    Args:
        metrics: All metrics of a run, with a loss or an accuracy among them.
        title: What was trained.
        path: Image file to write.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    panels = {label: choose(metrics, belongs) for label, belongs in PANELS.items()}
    panels = {label: chosen for label, chosen in panels.items() if chosen}
    heading = textwrap.fill(title, 90)
    height = 0.8 + 0.2 * heading.count("\n") + 2.6 * len(panels)
    figure = Figure(figsize=(7.5, height), dpi=150, layout="constrained")
    figure.suptitle(heading, fontsize=10, x=0.02, horizontalalignment="left")
    all_axes = figure.subplots(len(panels), squeeze=False, sharex=True)[:, 0]
    for axes, (label, chosen) in zip(all_axes, panels.items(), strict=True):
        _draw_panel(axes, label, chosen)
    all_axes[-1].set_xlabel("optimizer step")
    figure.align_ylabels()
    figure.savefig(path)


def choose(metrics: Mapping[str, Series], belongs: Callable[[str], bool]) -> dict[str, Series]:
    """Choose the metrics of one panel, in the order training, validation, test, others.

    Args:
        metrics: All metrics of a run.
        belongs: Whether a metric is of the panel.
    """
    splits = list(COLOURS)
    order = {name: splits.index(_split(name)) if _split(name) in splits else 3 for name in metrics}
    return {name: metrics[name] for name in sorted(order, key=order.__getitem__) if belongs(name)}


def _split(name: str) -> str:
    """Take ``val`` from ``val/loss`` or ``val_loss``."""
    return name.replace("_", "/").partition("/")[0]


def _draw_panel(axes: Axes, label: str, metrics: Mapping[str, Series]) -> None:
    for name, series in metrics.items():
        if is_test(name):
            _draw_result(axes, name, series)
        else:
            _draw_curve(axes, name, series)
    values = [v for series in metrics.values() for v in series.values if math.isfinite(v)]
    if label == "loss" and min(values, default=0.0) > 0:
        _make_logarithmic(axes, max(values) / min(values))
    axes.set_ylabel(label)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)


def _make_logarithmic(axes: Axes, span: float) -> None:
    """Make an axis logarithmic, with ticks in plain numbers, also between powers of ten if those are few."""
    from matplotlib.ticker import LogLocator

    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    if span < 100:
        axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
        axes.yaxis.set_minor_formatter("{x:g}")


def _draw_curve(axes: Axes, name: str, series: Series) -> None:
    colour = COLOURS.get(_split(name))
    if len(series.values) <= FEW:
        summary = summarise(series)
        best = summary.highest if is_accuracy(name) else summary.lowest
        label = f"{name}, best {best.value:.4g}" if best else f"{name}, all NaN"
        axes.plot(series.steps, series.values, color=colour, marker="o", markersize=3, label=label)
        return
    window = 2 * (len(series.values) // FEW) + 1
    smooth = moving_average(series.values, window)
    raw = axes.plot(series.steps, series.values, color=colour, linewidth=0.6, alpha=0.5)
    label = f"{name}, mean of {window}"
    axes.plot(series.steps, smooth, color=raw[0].get_color(), label=label)


def _draw_result(axes: Axes, name: str, series: Series) -> None:
    """Draw the test result, one number, as a line across the panel."""
    value = series.values[-1]
    colour = COLOURS["test"]
    axes.axhline(
        value, color=colour, linewidth=1, linestyle=(0, (4, 3)), label=f"{name} {value:.4g}"
    )
