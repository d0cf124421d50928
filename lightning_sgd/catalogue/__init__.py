"""The single table of methods.

The console command ``lightning-sgd list``, the overview and the API reference of the documentation, and
the tests that every method must pass are generated from :data:`CATALOGUE`. Adding a method means adding
one record here; the tests then name every place that is still missing.
"""

from __future__ import annotations

from collections.abc import Iterator

from lightning_sgd.catalogue.methods import CATALOGUE, GROUPS
from lightning_sgd.catalogue.records import (
    FOLDERS,
    TOPICS,
    Group,
    Kind,
    Method,
    Paper,
    Plugin,
    Topic,
)

__all__ = [
    "CATALOGUE",
    "FOLDERS",
    "GROUPS",
    "TOPICS",
    "Group",
    "Kind",
    "Method",
    "Paper",
    "Plugin",
    "Topic",
    "find",
    "plugins",
]


def plugins(kind: Kind | None = None) -> Iterator[Plugin]:
    """Iterate over the plug-ins of all methods, or of one kind.

    Example:
        >>> [plugin.name for plugin in plugins("optimizer")][:1]
        ['MaSS']
    """
    for method in CATALOGUE:
        for plugin in method.plugins:
            if kind is None or plugin.kind == kind:
                yield plugin


def find(name: str) -> Method | None:
    """Find the method with this key, title or public name, ignoring case; ``None`` if there is none.

    Example:
        >>> find("MASS").title
        'MaSS'
        >>> find("mass_hyperparameters").key
        'mass'
    """
    wanted = name.casefold()
    for method in CATALOGUE:
        if wanted in {text.casefold() for text in (method.key, method.title, *method.symbols)}:
            return method
    return None
