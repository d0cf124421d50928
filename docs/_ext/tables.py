"""Markdown made from the catalogue and from the conformance suites."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import lightning_sgd
from lightning_sgd import aggregation
from lightning_sgd.catalogue import CATALOGUE, Method

if TYPE_CHECKING:
    from pathlib import Path

SIGNS = {"works": "✓", "refused": "refused", "": "–"}


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def overview(card: str = "methods/{key}.md") -> str:
    """One row per method, each title linked to its card."""
    return table(
        ["Method", "Switch it on with", "What it does", "Paper"],
        (
            [
                f"[{m.title}]({card.format(key=m.key)})",
                ", ".join(f"`{plugin.class_path}`" for plugin in m.plugins),
                m.summary,
                f"[{m.paper.venue} {m.paper.year}]({m.paper.url})",
            ]
            for m in CATALOGUE
        ),
    )


def choosing() -> str:
    """One row per method: from the symptom to the card."""
    rows = ([m.use_when, f"[{m.title}](methods/{m.key}.md)"] for m in CATALOGUE)
    return table(["What you see", "Look at"], rows)


def compatibility(pairs: Mapping[str, Mapping[str, str]]) -> str:
    """One row per feature, one column per plug-in."""
    names = sorted({name for statuses in pairs.values() for name in statuses}, key=str.casefold)
    rows = (
        [feature, *(SIGNS[statuses.get(name, "")] for name in names)]
        for feature, statuses in pairs.items()
    )
    return table(["Feature", *(f"`{name}`" for name in names)], rows)


def reference() -> str:
    """An autodoc entry for every public name, method by method, then the rest."""
    known = {name for method in CATALOGUE for name in method.symbols}
    rules = [name for name in aggregation.__all__ if name not in known]
    rest = [name for name in lightning_sgd.__all__ if name not in {*known, *rules}]
    parts = [_reference_of(m.title, m.symbols, m) for m in CATALOGUE]
    parts.append(_reference_of("Robust aggregation", rules, None))
    return "\n".join([*parts, _reference_of("Data, models and warnings", rest, None)])


def _reference_of(title: str, names: Iterable[str], method: Method | None) -> str:
    intro = f"The card of the method is [here](methods/{method.key}.md).\n" if method else ""
    return f"## {title}\n\n{intro}\n" + "\n".join(_autodoc(name) for name in names)


def _autodoc(name: str) -> str:
    is_class = isinstance(getattr(lightning_sgd, name), type)
    directive, options = ("autoclass", "   :members:\n") if is_class else ("autofunction", "")
    return f"```{{eval-rst}}\n.. {directive}:: lightning_sgd.{name}\n{options}```\n"


def write(folder: Path, compatibility_file: Path) -> None:
    """Write every generated page into ``folder``."""
    folder.mkdir(exist_ok=True)
    pages = {
        "overview.md": overview(),
        "choosing.md": choosing(),
        "compatibility.md": compatibility(json.loads(compatibility_file.read_text())),
        "reference.md": reference(),
    }
    for name, text in pages.items():
        (folder / name).write_text(text)
