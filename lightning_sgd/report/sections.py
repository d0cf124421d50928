"""What a page says about each plug-in of a run, and which of the metrics belong to it."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from lightning_sgd.catalogue import CATALOGUE, Plugin

if TYPE_CHECKING:
    from lightning_sgd.report.files import Series


@dataclass(frozen=True, slots=True)
class Panel:
    """Curves that belong in one chart.

    Attributes:
        title: What they show.
        main: The curve that is meant; empty if all are alike.
        curves: By name; those of layers or ranks without what all names have in common.
        error: Half width of a band around the main curve, if known.
    """

    title: str
    main: str
    curves: Mapping[str, Series]
    error: Series | None = None


@dataclass(frozen=True, slots=True)
class Section:
    """One plug-in.

    Attributes:
        plugin: Name of its class.
        start: What it said at the start.
        end: What it said at the end.
        metrics: Those of the run that are its own.
        figures: Files of its figures, by key.
    """

    plugin: str
    start: str = ""
    end: str = ""
    metrics: Mapping[str, Series] = field(default_factory=dict)
    figures: Mapping[str, str] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """The name in words."""
        return in_words(self.plugin)

    @property
    def purpose(self) -> str:
        """The first sentence of its documentation; empty for classes of others."""
        return purpose_of(self.plugin)


def in_words(name: str) -> str:
    """Turn a class name into a heading.

    Args:
        name: In camel case.

    Example:
        >>> in_words("TailIndexMonitor"), in_words("LocalSGDStrategy")
        ('Tail index monitor', 'Local SGD strategy')
    """
    words = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z0-9]+", name)
    lower = [word if word.isupper() and len(word) > 1 else word.lower() for word in words]
    return _capitalised(" ".join(lower))


def purpose_of(plugin: str) -> str:
    """Take the first sentence of the documentation of a class of this package.

    Args:
        plugin: Name of the class.
    """
    import lightning_sgd

    doc = inspect.getdoc(getattr(lightning_sgd, plugin, None)) if plugin in _plugins() else None
    return doc.partition("\n\n")[0].replace("\n", " ").replace("``", "") if doc else ""


def sections(metrics: Mapping[str, Series], findings: Mapping[str, Any]) -> list[Section]:
    """Make one section for each plug-in with a message, or, without messages, for each monitor with metrics.

    Args:
        metrics: All metrics of the run.
        findings: What was kept beside them; may be empty.
    """
    known = _plugins()
    said: Mapping[str, Mapping[str, str]] = findings.get("plugins", {})
    figures: Mapping[str, str] = findings.get("figures", {})
    names = list(said) or [name for name, plugin in known.items() if plugin.kind == "callback"]
    found = []
    for name in names:
        patterns = known[name].metric_keys if name in known else ()
        section = Section(
            name,
            _capitalised(said.get(name, {}).get("start", "")),
            _capitalised(said.get(name, {}).get("end", "")),
            {key: series for key, series in metrics.items() if _belongs(key, patterns)},
            {key: file for key, file in figures.items() if _family(key) in _families(patterns)},
        )
        if section.start or section.end or section.metrics:
            found.append(section)
    return found


def panels(metrics: Mapping[str, Series]) -> list[Panel]:
    """Sort metrics into groups of one chart each.

    ``a/b`` is the main curve among ``a/b/c`` for all ``c``, and ``a/b_error`` the width of a band around it. Without a
    chart are metrics that never change.

    Args:
        metrics: Some of a run.

    Example:
        >>> from lightning_sgd.report.files import Series
        >>> value = Series([0, 1], [1.0, 2.0])
        >>> [(p.title, list(p.curves)) for p in panels({"a/b": value, "a/b/x": value, "a/c": value})]
        [('a/b', ['a/b', 'x']), ('a/c', ['a/c'])]
    """
    groups: dict[str, dict[str, Series]] = {}
    for key, series in metrics.items():
        if constant(series) is None:
            groups.setdefault("/".join(key.split("/")[:2]), {})[key] = series
    errors = {name for name in groups if name.endswith("_error") and name[:-6] in groups}
    return [
        Panel(
            title,
            title if title in group else "",
            {key.removeprefix(f"{title}/"): series for key, series in group.items()},
            groups.get(f"{title}_error", {}).get(f"{title}_error"),
        )
        for title, group in groups.items()
        if title not in errors
    ]


def constant(series: Series) -> float | None:
    """Find the value of a metric that was constant, or logged once; NaN if it never was a number.

    Args:
        series: At least one value.

    Example:
        >>> from lightning_sgd.report.files import Series
        >>> constant(Series([0, 1], [3.0, 3.0])), constant(Series([0, 1], [3.0, 4.0]))
        (3.0, None)
    """
    finite = {value for value in series.values if math.isfinite(value)}
    return None if len(finite) > 1 else next(iter(finite), math.nan)


def others(metrics: Mapping[str, Series], taken: Iterable[Section]) -> dict[str, Series]:
    """List the metrics that are in no section.

    Args:
        metrics: All metrics of the run.
        taken: The sections.
    """
    gone = {key for section in taken for key in section.metrics}
    return {key: series for key, series in metrics.items() if key not in gone}


def _capitalised(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]


def _plugins() -> dict[str, Plugin]:
    return {plugin.name: plugin for method in CATALOGUE for plugin in method.plugins}


def _belongs(key: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(key, pattern) for pattern in patterns)


def _family(key: str) -> str:
    return key.partition("/")[0]


def _families(patterns: Sequence[str]) -> set[str]:
    return {_family(pattern) for pattern in patterns}
