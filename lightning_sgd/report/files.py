"""Reads the files of a run: ``metrics.csv`` of Lightning's CSV logger, and ``config.yaml``."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import yaml

from lightning_sgd._run_log import FILE as FINDINGS

if TYPE_CHECKING:
    from pathlib import Path

METRICS = "metrics.csv"
CONFIG = "config.yaml"
PLOT = "report.png"
PAGE = "report.html"


class ReportError(ValueError):
    """There is nothing to report on; the text is one line for the user."""


@dataclass(slots=True)
class Series:
    """The values of one metric in the order in which they were logged.

    Attributes:
        steps: Optimizer step of each value.
        values: The values; NaN where training had lost its way.
    """

    steps: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)


def find_metrics(run: Path) -> Path:
    """Find the file with the metrics of a run.

    Args:
        run: The folder of the run, or any folder above it: then the run that was written last.

    Raises:
        ReportError: If there is none.
    """
    if not run.exists():
        raise ReportError(f"run folder '{run}' does not exist")
    if run.name == METRICS or (run / METRICS).is_file():
        return run if run.is_file() else run / METRICS
    found = sorted(run.rglob(METRICS), key=lambda path: path.stat().st_mtime)
    if not found:
        raise ReportError(f"no {METRICS} in or below '{run}': train with Lightning's CSVLogger")
    return found[-1]


def read_metrics(path: Path) -> dict[str, Series]:
    """Read all metrics of a run, sorted by name, without the empty cells.

    Args:
        path: File of the CSV logger, with a column ``step``.

    Raises:
        ReportError: If the file holds no metrics.
    """
    series: dict[str, Series] = {}
    with path.open(newline="", encoding="utf-8") as file:
        for position, row in enumerate(csv.DictReader(file)):
            step = int(_number(row.get("step"), path) or position)
            for name, cell in row.items():
                value = None if name in {"step", "epoch"} else _number(cell, path)
                if value is not None:
                    column = series.setdefault(name, Series())
                    column.steps.append(step)
                    column.values.append(value)
    if not series:
        raise ReportError(f"'{path}' holds no metrics")
    return dict(sorted(series.items()))


def _number(cell: str | None, path: Path) -> float | None:
    if not cell:
        return None
    try:
        return float(cell)
    except ValueError:
        raise ReportError(f"'{path}' is no log of numbers: found '{cell}'") from None


def read_config(folder: Path) -> Mapping[str, object]:
    """Read the settings beside the metrics; empty if they were not saved.

    Args:
        folder: Folder of the run.
    """
    try:
        config = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
    except (FileNotFoundError, yaml.YAMLError):
        return {}
    return config if isinstance(config, dict) else {}


def read_findings(folder: Path) -> Mapping[str, Any]:
    """Read the messages of plug-ins beside the metrics; empty if there is no such file.

    Args:
        folder: Folder of the run.
    """
    try:
        found = json.loads((folder / FINDINGS).read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return {}
    return found if isinstance(found, dict) else {}


def read_text(file: Path) -> str:
    """Read the text of a file; empty if there is none.

    Args:
        file: Perhaps a file.
    """
    return file.read_text(encoding="utf-8") if file.is_file() else ""
