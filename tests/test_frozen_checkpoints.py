"""Checkpoints that users have keep working: those of earlier versions are resumed, bit by bit."""

from __future__ import annotations

import shutil

import pytest
import torch
from support.frozen_checkpoints import COMPARED, STEPS, content, plain_sgd, train
from support.settings import SETTINGS
from support.watching import assert_equal

from lightning_sgd.catalogue import plugins

PLUGINS = [plugin for plugin in plugins() if plugin.kind not in ("model", "data")]

pytestmark = [
    pytest.mark.timeout(60),
    # The resumed run keeps its files apart on purpose.
    pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning"),
]


@pytest.fixture(scope="module")
def folder(root, request, tmp_path_factory):
    """Where the files are; with ``--write-checkpoints`` those that are missing are written first."""
    files = root / "tests" / "checkpoints"
    if request.config.getoption("--write-checkpoints"):
        for plugin in PLUGINS:
            if not (files / plugin.name).exists():
                written = tmp_path_factory.mktemp(plugin.name)
                train(plugin, SETTINGS, written)
                (files / plugin.name).mkdir(parents=True)
                for file in written.glob("*.ckpt"):  # not the figures
                    shutil.copy(file, files / plugin.name)
        torch.save(plain_sgd(), files / "plain_sgd.pt")
    return files


@pytest.fixture(scope="module")
def exact(folder):
    """Whether this machine rounds as the one that wrote the files: another order of additions shows in plain SGD."""
    return torch.equal(plain_sgd(), torch.load(folder / "plain_sgd.pt", weights_only=True))


@pytest.mark.parametrize("plugin", PLUGINS, ids=lambda plugin: plugin.name)
def test_a_checkpoint_of_an_earlier_version_resumes(plugin, folder, exact, tmp_path):
    middle = folder / plugin.name / "middle.ckpt"
    train(plugin, SETTINGS, tmp_path, resume=middle)
    ours, expected = (content(place / "end.ckpt") for place in (tmp_path, folder / plugin.name))
    assert torch.load(tmp_path / "end.ckpt", weights_only=True)["global_step"] == STEPS
    assert set(ours) == set(expected)
    if exact:
        assert_equal(ours, expected, "the end")
    else:
        for key in COMPARED[:2]:
            torch.testing.assert_close(ours[key], expected[key], rtol=1e-4, atol=1e-6)
    with pytest.raises(AssertionError):  # the comparison can fail
        assert_equal(content(middle), expected, "the middle")
