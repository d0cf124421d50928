"""What users' configs depend on is frozen in one reviewed file, ``tests/surface.json``."""

from __future__ import annotations

import importlib.util
import inspect
import json

from support.compatibility import COMPLETE, FILE, PAIRS

import lightning_sgd
from lightning_sgd.catalogue import CATALOGUE, plugins

SURFACE = "tests/surface.json"


def arguments(name):
    """Argument names with their defaults, as text; required ones without."""
    parameters = inspect.signature(getattr(lightning_sgd, name)).parameters.values()
    return {p.name: "required" if p.default is p.empty else repr(p.default) for p in parameters}


def surface():
    public = {
        name: arguments(name)
        for name in sorted(lightning_sgd.__all__, key=str.casefold)
        if not name.endswith("Warning")
    }
    return {
        "version": 1,
        "names": public,
        "metric keys": {plugin.name: list(plugin.metric_keys) for plugin in plugins()},
        "methods": [method.key for method in CATALOGUE],
    }


def test_the_public_surface_is_as_reviewed(root, request):
    file = root / SURFACE
    if request.config.getoption("--write-surface"):
        file.write_text(json.dumps(surface(), indent=2, ensure_ascii=False) + "\n")
    reviewed = json.loads(file.read_text())
    assert surface() == reviewed, "run pytest --write-surface and review the difference"


def test_the_compatibility_table_is_what_the_suites_test(root, request):
    written = json.loads((root / FILE).read_text())
    collected = request.config.stash[PAIRS]
    if request.config.stash[COMPLETE]:
        assert collected == written, "run pytest --write-compatibility and review the difference"
    for feature, statuses in collected.items():
        assert statuses.items() <= written[feature].items()


def test_the_table_of_the_readme_is_the_catalogue(root, request):
    spec = importlib.util.spec_from_file_location("tables", root / "docs" / "_ext" / "tables.py")
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    file = root / "README.md"
    before, rest = file.read_text().split("<!-- methods -->\n")
    _, after = rest.split("<!-- /methods -->")
    current = f"{before}<!-- methods -->\n{tables.overview('docs/methods/{key}.md')}<!-- /methods -->{after}"
    if request.config.getoption("--write-surface"):
        file.write_text(current)
    assert file.read_text() == current, "run pytest --write-surface and review the difference"
