"""The callbacks of the catalogue, each as the subject of the suite."""

from __future__ import annotations

import pytest
from support.callback_checks import Subject
from support.settings import SETTINGS

import lightning_sgd
from lightning_sgd.catalogue import plugins

OTHER_SETTINGS: dict[str, dict[str, object]] = {
    "PrioritySampling": {"beta": 1.0},
    "TrajectoryRegularization": {"inner_steps": 2},
}
"""By name, what distinguishes two instances in one Trainer, where a longer interval does not."""

DEPRECATED = {"CommunicationMonitor": "communication/*"}
"""By name, the keys that only ``trainer.callback_metrics`` still has."""


def is_observer(plugin):
    """Whether it promises to leave training as it is."""
    return plugin.name.endswith("Monitor")


def pytest_generate_tests(metafunc):
    if "plugin" in metafunc.fixturenames:
        callbacks = list(plugins("callback"))
        if "observer" in metafunc.fixturenames:
            callbacks = [plugin for plugin in callbacks if is_observer(plugin)]
        metafunc.parametrize("plugin", callbacks, ids=[plugin.name for plugin in callbacks])


@pytest.fixture
def subject(plugin):
    """The callback with its conformance settings."""

    def make(**settings):
        return getattr(lightning_sgd, plugin.name)(**{**SETTINGS[plugin.name], **settings})

    interval = "every_n_epochs" if "every_n_epochs" in SETTINGS[plugin.name] else "every_n_steps"
    longer = {interval: SETTINGS[plugin.name].get(interval, 1) + 1}
    other_settings = OTHER_SETTINGS.get(plugin.name, longer)
    return Subject(
        make,
        plugin.metric_keys,
        is_observer(plugin),
        other_settings,
        DEPRECATED.get(plugin.name),
    )


@pytest.fixture
def observer(subject):
    """The callback, where only those that leave training as it is are meant."""
    return subject
