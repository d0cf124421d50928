"""The reproductions as modules."""

from __future__ import annotations

import importlib


def load(name):
    """Import a reproduction; ``pyproject.toml`` puts their folder on the path of the tests."""
    return importlib.import_module(name)
