"""The page of a run: one HTML file that needs neither other files nor a network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_sgd.report.charts import draw, embedded
from lightning_sgd.report.sections import Section, constant, others, panels, sections
from lightning_sgd.report.summary import is_accuracy, is_loss, is_test, summarise

if TYPE_CHECKING:
    from lightning_sgd.report.files import Series

TEMPLATE = "page.html.jinja"


@dataclass(frozen=True, slots=True)
class Run:
    """What a page is made from.

    Attributes:
        folder: Where the run is.
        title: What was trained.
        metrics: All of them.
        settings: What was trained and how, in words.
        config: Text of the configuration; empty if it was not saved.
        findings: What plug-ins said, with versions; empty if that was not kept.
    """

    folder: Path
    title: str
    metrics: Mapping[str, Series]
    settings: Mapping[str, str]
    config: str
    findings: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Picture:
    """An image.

    Attributes:
        text: What it shows, for who does not see it.
        address: Of its data.
        wide: Whether it takes the whole width.
    """

    text: str
    address: str
    wide: bool = False


@dataclass(frozen=True, slots=True)
class Row:
    """A metric in a table, in text."""

    name: str
    first: str
    low: str
    high: str
    last: str


@dataclass(frozen=True, slots=True)
class Part:
    """A section of the page, with everything that it shows."""

    anchor: str
    title: str
    purpose: str
    start: str
    end: str
    pictures: list[Picture]
    constants: list[tuple[str, str]]
    rows: list[Row]


def page(run: Run) -> str:
    """Make the page.

    Args:
        run: What it is about.

    Raises:
        ModuleNotFoundError: If matplotlib or Jinja2 is not installed.
    """
    import jinja2

    found = sections(run.metrics, run.findings)
    rest = others(run.metrics, found)
    curves = {key: rest[key] for key in rest if _is_course(key)}
    tests = {key: series for key, series in rest.items() if is_test(key)}
    more = {key: rest[key] for key in rest if key not in curves and key not in tests}
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(TEMPLATE).render(
        run=run,
        name=run.folder.resolve().name,
        parts=[_part(section, run.folder) for section in found],
        results=[(key, _number(series.values[-1])) for key, series in tests.items()],
        course=_charts(curves),
        course_rows=_rows(curves),
        more=_charts(more),
        more_constants=_constants(more),
        more_rows=_rows(more),
    )


def _is_course(key: str) -> bool:
    return (is_loss(key) or is_accuracy(key)) and not is_test(key)


def _part(section: Section, folder: Path) -> Part:
    figures = ((key, embedded(_found(folder, file))) for key, file in section.figures.items())
    pictures = [Picture(key, address, wide=True) for key, address in figures if address]
    return Part(
        anchor=section.plugin,
        title=section.title,
        purpose=section.purpose,
        start=section.start,
        end=section.end,
        pictures=[*pictures, *_charts(section.metrics)],
        constants=_constants(section.metrics),
        rows=_rows(section.metrics),
    )


def _found(folder: Path, file: str) -> Path:
    """Find a figure, also after the run has been moved."""
    moved = folder / Path(file).name
    return moved if moved.is_file() else Path(file)


def _charts(metrics: Mapping[str, Series]) -> list[Picture]:
    return [Picture(panel.title, draw(panel)) for panel in panels(metrics)]


def _constants(metrics: Mapping[str, Series]) -> list[tuple[str, str]]:
    values = {key: constant(series) for key, series in metrics.items()}
    return [(key, _number(value)) for key, value in values.items() if value is not None]


def _rows(metrics: Mapping[str, Series]) -> list[Row]:
    return [_row(key, series) for key, series in metrics.items()]


def _row(key: str, series: Series) -> Row:
    summary = summarise(series)
    low, high = (_extreme(value) for value in (summary.lowest, summary.highest))
    return Row(key, _number(summary.first), low, high, _number(summary.last))


def _extreme(extreme: Any) -> str:
    return "–" if extreme is None else f"{_number(extreme.value)} at {extreme.step}"


def _number(value: float) -> str:
    return f"{value:.4g}"
