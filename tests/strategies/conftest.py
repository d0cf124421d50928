"""The strategies of the catalogue, each as the subject of the suite."""

from __future__ import annotations

import pytest
from support.settings import SETTINGS
from support.strategy_training import FORK

import lightning_sgd
from lightning_sgd.catalogue import plugins


def pytest_generate_tests(metafunc):
    if "plugin" in metafunc.fixturenames:
        strategies = list(plugins("strategy"))
        metafunc.parametrize("plugin", strategies, ids=[plugin.name for plugin in strategies])


@pytest.fixture
def make(plugin):
    """A function that builds the strategy with its conformance settings, on forked processes."""

    def build(**settings):
        return getattr(lightning_sgd, plugin.name)(**{**SETTINGS[plugin.name], **FORK, **settings})

    return build
