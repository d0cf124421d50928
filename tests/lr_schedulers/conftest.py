"""The learning-rate schedulers of the catalogue."""

from __future__ import annotations

import pytest
from support.settings import SETTINGS

import lightning_sgd
from lightning_sgd.catalogue import plugins


def pytest_generate_tests(metafunc):
    if "plugin" in metafunc.fixturenames:
        schedulers = list(plugins("lr_scheduler"))
        metafunc.parametrize("plugin", schedulers, ids=[plugin.name for plugin in schedulers])


@pytest.fixture
def make(plugin):
    """A function that builds the scheduler with its conformance settings."""

    def build(optimizer, **settings):
        return getattr(lightning_sgd, plugin.name)(
            optimizer, **{**SETTINGS[plugin.name], **settings}
        )

    return build
