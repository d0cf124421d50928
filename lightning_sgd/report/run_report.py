"""``lightning-sgd report``: find, summarise, print and plot one run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rich.console import Console

from lightning_sgd.report.files import (
    CONFIG,
    PAGE,
    PLOT,
    Series,
    find_metrics,
    read_config,
    read_findings,
    read_metrics,
    read_text,
)
from lightning_sgd.report.page import Run, page
from lightning_sgd.report.plot import can_plot, save_plot
from lightning_sgd.report.summary import describe_run
from lightning_sgd.report.tables import metrics_table, results_panel, settings_table


def report(run: str | Path, console: Console | None = None) -> None:
    """Print the summary of a run, and save its plot and its page beside its metrics.

    Args:
        run: The folder of the run, or any folder above it: then the run that was written last.
        console: Where to print; the terminal by default.

    Raises:
        ReportError: If there is no run to report on.
    """
    console = console or Console()
    path = find_metrics(Path(run))
    metrics = read_metrics(path)
    settings = describe_run(read_config(path.parent))
    for part in (settings_table(settings), metrics_table(metrics), results_panel(metrics)):
        if part is not None:
            console.print(part)
    for line in _where(path, metrics, settings):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _where(path: Path, metrics: Mapping[str, Series], settings: Mapping[str, str]) -> list[str]:
    """Make one line per file of the report."""
    config = path.with_name(CONFIG)
    return [
        f"metrics  {path}",
        f"config   {config if config.is_file() else 'none was saved'}",
        f"plot     {_plot(path.with_name(PLOT), metrics, settings)}",
        f"page     {_page(path, metrics, settings)}",
    ]


def _plot(image: Path, metrics: Mapping[str, Series], settings: Mapping[str, str]) -> str:
    """Save the plot; say where it is, or why there is none."""
    if not can_plot(metrics):
        return "none: no loss and no accuracy was logged"
    try:
        save_plot(metrics, _title(settings) or image.parent.resolve().name, image)
    except ModuleNotFoundError:
        return "none: `pip install 'lightning-sgd[report]'` brings matplotlib"
    return str(image)


def _page(path: Path, metrics: Mapping[str, Series], settings: Mapping[str, str]) -> str:
    """Save the page; say where it is, or why there is none."""
    folder, file = path.parent, path.with_name(PAGE)
    findings, config = read_findings(folder), read_text(folder / CONFIG)
    try:
        text = page(Run(folder, _title(settings), metrics, settings, config, findings))
    except ModuleNotFoundError:
        return "none: `pip install 'lightning-sgd[report]'` brings matplotlib and Jinja2"
    file.write_text(text, encoding="utf-8")
    return str(file)


def _title(settings: Mapping[str, str]) -> str:
    """Make a title that begins with the optimizer and its settings: runs are compared by it."""
    words = [settings[name] for name in ("optimizer", "scheduler", "strategy") if name in settings]
    return ", ".join(words)
