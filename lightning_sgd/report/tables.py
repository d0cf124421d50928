"""The report in the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from lightning_sgd.report.summary import (
    Extreme,
    Summary,
    is_accuracy,
    is_loss,
    is_test,
    summarise,
)

if TYPE_CHECKING:
    from lightning_sgd.report.files import Series


def settings_table(settings: Mapping[str, str]) -> Table:
    """Make a table with name and value of each setting.

    Args:
        settings: What was trained and how.
    """
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in settings.items():
        table.add_row(name, Text(value))
    return table


def metrics_table(metrics: Mapping[str, Series]) -> Table | None:
    """Make a table of first, best and last value of each metric but those of the test set; ``None`` if there is none.

    Args:
        metrics: All metrics of a run.
    """
    table = Table(header_style="bold")
    table.add_column("Metric", style="cyan", overflow="fold")
    for heading in ("First", "Best", "at step", "Last"):
        table.add_column(heading, justify="right")
    for name, series in metrics.items():
        if not is_test(name):
            summary = summarise(series)
            value, step = _best(name, summary)
            table.add_row(name, _number(summary.first), value, step, _number(summary.last))
    return table if table.row_count else None


def results_panel(metrics: Mapping[str, Series]) -> Panel | None:
    """Show the last value of each metric of the test set; ``None`` if the run was not tested.

    Args:
        metrics: All metrics of a run.
    """
    results = {name: series.values[-1] for name, series in metrics.items() if is_test(name)}
    if not results:
        return None
    table = Table.grid(padding=(0, 3))
    for name, value in results.items():
        table.add_row(Text(name), Text(_number(value), style="bold green"))
    return Panel(table, title="Test set", title_align="left", expand=False)


def _best(name: str, summary: Summary) -> tuple[str, str]:
    """Find the best value and its step; both extremes where neither direction is better."""
    if is_loss(name):
        return _row([summary.lowest])
    if is_accuracy(name):
        return _row([summary.highest])
    return _row([summary.lowest, summary.highest])


def _row(extremes: Iterable[Extreme | None]) -> tuple[str, str]:
    known = [extreme for extreme in extremes if extreme is not None]
    if not known:
        return "–", "–"
    return (
        " … ".join(_number(extreme.value) for extreme in known),
        " … ".join(str(extreme.step) for extreme in known),
    )


def _number(value: float) -> str:
    return f"{value:.4g}"
