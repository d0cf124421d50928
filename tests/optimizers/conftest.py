"""The optimizers of the catalogue, each in every implementation that it offers."""

from __future__ import annotations

import inspect

import pytest
from support.settings import SETTINGS

import lightning_sgd
from lightning_sgd.catalogue import plugins

IMPLEMENTATIONS = {
    "for-loop": {"foreach": False, "fused": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}


def implementations(plugin):
    """Names of the implementations whose switches the constructor has."""
    accepted = inspect.signature(getattr(lightning_sgd, plugin.name)).parameters
    return [
        name for name, switches in IMPLEMENTATIONS.items() if set(switches) <= set(accepted)
    ] or ["default"]


def pytest_generate_tests(metafunc):
    if "plugin" not in metafunc.fixturenames:
        return
    optimizers = list(plugins("optimizer"))
    if "implementation" in metafunc.fixturenames:
        cases = [(plugin, name) for plugin in optimizers for name in implementations(plugin)]
        ids = [f"{plugin.name}-{name}" for plugin, name in cases]
        metafunc.parametrize(("plugin", "implementation"), cases, ids=ids)
    else:
        metafunc.parametrize("plugin", optimizers, ids=[plugin.name for plugin in optimizers])


@pytest.fixture
def make(plugin, request):
    """A function that builds the optimizer with its conformance settings, in the implementation under test."""
    switches = {}
    if "implementation" in request.fixturenames:
        switches = IMPLEMENTATIONS.get(request.getfixturevalue("implementation"), {})
    optimizer_class = getattr(lightning_sgd, plugin.name)

    def build(params, **settings):
        return optimizer_class(params, **{**SETTINGS[plugin.name], **switches, **settings})

    return build
