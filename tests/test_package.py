"""The package as it is imported, documented and built."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import subprocess
import sys
import tarfile
import zipfile

import pytest

import lightning_sgd

MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(lightning_sgd.__path__, "lightning_sgd.")
    if not module.name.endswith("__main__")
)
LINKS = {"callbacks": "../callbacks", "strategies": "../strategies", "cards": "../docs/methods"}


@pytest.mark.parametrize("name", ["lightning_sgd", *MODULES])
def test_examples_in_docstrings_run(name):
    module = importlib.import_module(name)
    assert module.__doc__, "a module begins with what it is for"
    assert doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE).failed == 0


@pytest.mark.parametrize("name", LINKS)
def test_links_are_links(root, name):
    # A checkout without symbolic links (Windows) holds text files instead.
    link = root / "lightning_sgd" / name
    assert link.is_symlink(), f"lightning_sgd/{name} must be a link: git config core.symlinks true"
    assert str(link.readlink()) == LINKS[name]


def test_importing_brings_no_heavy_library():
    # Optional and slow libraries are imported where they are used.
    code = (
        "import sys, lightning.pytorch, lightning.pytorch.cli; before = set(sys.modules); "
        "import lightning_sgd; "
        "heavy = {'scipy', 'sklearn', 'matplotlib', 'pandas', 'networkx', 'cvxpy', 'rich'}; "
        "print(sorted(heavy & {m.split('.')[0] for m in set(sys.modules) - before}))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=100
    )
    assert result.stdout.strip() == "[]", result.stderr


def test_the_command_prints_its_version():
    code = [sys.executable, "-m", "lightning_sgd", "--version"]
    result = subprocess.run(code, capture_output=True, text=True, timeout=100)
    assert lightning_sgd.__version__ in result.stdout, result.stderr


@pytest.fixture(scope="module")
def distributions(tmp_path_factory, root):
    """An sdist built from the tracked files, and the wheel built from that sdist."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(root)]
    subprocess.run(command, check=True, capture_output=True, timeout=110)
    return next(out.glob("*.tar.gz")), next(out.glob("*.whl"))


def test_the_wheel_holds_real_files_and_nothing_generic(distributions):
    with zipfile.ZipFile(distributions[1]) as wheel:
        names = wheel.namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"lightning_sgd"}
    for expected in (
        "lightning_sgd/py.typed",
        "lightning_sgd/callbacks/__init__.py",
        "lightning_sgd/strategies/__init__.py",
        "lightning_sgd/cards/mass.md",
        "lightning_sgd/optimizers/mass.py",
    ):
        assert expected in names


def test_the_sdist_can_be_worked_with(distributions):
    with tarfile.open(distributions[0]) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert {"Makefile", "constraints.txt", "examples/mass.yaml", "docs/conf.py"} <= names
    assert {"tests/conftest.py", "lightning_sgd/callbacks/__init__.py", "LICENSE"} <= names
