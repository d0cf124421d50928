"""Markdown made from the catalogue and from the conformance suites."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import lightning_sgd
from lightning_sgd.catalogue import CATALOGUE, GROUPS, TOPICS, Topic

if TYPE_CHECKING:
    from pathlib import Path

SIGNS = {"works": "✓", "refused": "refused", "": "–"}


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Make a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def overview(card: str = "methods/{key}.md") -> str:
    """Make the table of methods: one row each, with a link to the card."""
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
    """Make one section per topic, and in it one row per method: from the symptom to the card."""
    return "\n".join(f"## {TOPICS[topic]}\n\n{_symptoms(topic)}" for topic in TOPICS)


def _symptoms(topic: Topic) -> str:
    methods = [method for method in CATALOGUE if method.topic == topic]
    rows = ([m.use_when, f"[{m.title}](methods/{m.key}.md)"] for m in methods)
    return table(["What you see", "Look at"], rows)


def compatibility(pairs: Mapping[str, Mapping[str, str]]) -> str:
    """Make the table of what works together: one row per feature, one column per plug-in."""
    names = sorted({name for statuses in pairs.values() for name in statuses}, key=str.casefold)
    rows = (
        [feature, *(SIGNS[statuses.get(name, "")] for name in names)]
        for feature, statuses in pairs.items()
    )
    return table(["Feature", *(f"`{name}`" for name in names)], rows)


def reference() -> str:
    """Make an autodoc entry for every public name: method by method, then group by group."""
    parts = [
        _section(m.title, m.symbols, f"The card of the method is [here](methods/{m.key}.md).\n")
        for m in CATALOGUE
    ]
    return "\n".join([*parts, *(_section(group.title, group.symbols) for group in GROUPS)])


def _section(title: str, names: Iterable[str], intro: str = "") -> str:
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
