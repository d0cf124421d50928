"""Shared set-up: one thread per process, a clean environment, and the record behind the compatibility table."""

from __future__ import annotations

import json
import os
from pathlib import Path

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # before torch: forked ranks must not inherit busy pools

# LightningCLI calls a method that jsonargparse has deprecated.
os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")

import hypothesis
import pytest
import torch
from support.compatibility import COMPLETE, FILE, PAIRS
from support.markers import starts_processes

# How long an example takes depends on what else the machine does.
hypothesis.settings.register_profile("no deadline", deadline=None)
hypothesis.settings.load_profile("no deadline")

ROOT = Path(__file__).resolve().parent.parent


def pytest_addoption(parser):
    parser.addoption(
        "--write-compatibility",
        action="store_true",
        help="write docs/compatibility.json from the tests that are collected",
    )
    parser.addoption(
        "--write-surface",
        action="store_true",
        help="write tests/surface.json from the names, arguments and keys of the package",
    )
    parser.addoption(
        "--write-checkpoints",
        action="store_true",
        help="write the files in tests/checkpoints that are missing; those of earlier versions stay",
    )


def pytest_configure(config):
    config.addinivalue_line(
        "markers",
        "compatible(feature, status='works'): the test shows that a plug-in and a feature go together, "
        "or, with status 'refused', that the combination is refused with a remedy",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Mark tests that start processes, and collect what the suites test, before any selection by ``-k`` or ``-m``."""
    table: dict[str, dict[str, str]] = {}
    for item in items:
        if starts_processes(item):
            item.add_marker(pytest.mark.ranks)
        mark = item.get_closest_marker("compatible")
        if mark is not None:
            feature, status = (*mark.args, "works")[:2]
            table.setdefault(feature, {})[item.callspec.params["plugin"].name] = status
    config.stash[PAIRS] = {
        feature: dict(sorted(table[feature].items())) for feature in sorted(table)
    }
    config.stash[COMPLETE] = config.args == config.getini("testpaths") or config.args == ["tests"]
    if config.getoption("--write-compatibility"):
        (ROOT / FILE).write_text(
            json.dumps(config.stash[PAIRS], indent=2, ensure_ascii=False) + "\n"
        )


@pytest.fixture(autouse=True)
def _clean_environment():
    """Launchers leave MASTER_PORT and the like behind; threads and default types may be changed too."""
    environment, threads = dict(os.environ), torch.get_num_threads()
    yield
    # A strategy on one rank makes a process group in this process, and later trainings would take it for theirs.
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def root() -> Path:
    """Root of the repository."""
    return ROOT
