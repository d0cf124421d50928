"""The example of every method, through the command that the README names."""

from __future__ import annotations

import sys
import time

import pytest
import torch
import yaml

import lightning_sgd
from lightning_sgd.catalogue import CATALOGUE
from lightning_sgd.cli import main

pytestmark = pytest.mark.slow

METHODS = pytest.mark.parametrize("method", CATALOGUE, ids=lambda method: method.key)


@pytest.fixture
def command(tmp_path, monkeypatch, method):
    """Run ``lightning-sgd`` in an empty working directory; strategies fork, because popen would run pytest again."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-sgd"])
    has_ranks = method.plugins[0].kind == "strategy"
    extra = ("--trainer.strategy.start_method=fork",) if has_ranks else ()
    return lambda *args: main([str(arg) for arg in (*args, *extra)])


def weights(checkpoint):
    return torch.load(checkpoint, weights_only=True)["state_dict"]


def saved(path):
    """The only checkpoint below ``path`` with this many steps."""
    return next(path.glob("*.ckpt"))


@METHODS
def test_the_example_trains_within_a_minute(method, command, root):
    begin = time.perf_counter()
    command("fit", "--config", root / method.example)
    assert time.perf_counter() - begin < 60


# A single step ends before the validation that the checkpoint of the example looks at.
@pytest.mark.filterwarnings("ignore:.*could not find the monitored key:UserWarning")
@METHODS
def test_the_printed_config_is_the_config(method, command, root, capsys, tmp_path):
    example = root / method.example
    with pytest.raises(SystemExit) as stop:
        command("fit", "--config", example, "--print_config")
    assert stop.value.code == 0
    first = capsys.readouterr().out
    printed = tmp_path / "printed.yaml"
    printed.write_text(first)
    command("fit", "--config", printed, "--trainer.max_steps", "1")
    with pytest.raises(SystemExit):
        capsys.readouterr()
        command("fit", "--config", printed, "--print_config")
    assert yaml.safe_load(capsys.readouterr().out) == yaml.safe_load(first)
    for plugin in method.plugins[:1]:
        assert plugin.class_path in first, "the stable spelling is written back"


@METHODS
def test_the_lines_at_the_top_of_the_card_are_accepted(method, command, root, capsys, tmp_path):
    card = (root / method.card).read_text()
    lines = card.split("```yaml\n", 1)[1].split("```", 1)[0]
    snippet = tmp_path / "snippet.yaml"
    snippet.write_text(lines)
    with pytest.raises(SystemExit) as stop:
        command("fit", "--config", root / method.example, "--config", snippet, "--print_config")
    assert stop.value.code == 0
    assert set(yaml.safe_load(lines)) <= set(yaml.safe_load(capsys.readouterr().out))
    assert len(lines.strip().splitlines()) <= 8


# The resumed run keeps its files apart on purpose, and 40 steps may end before the first validation, or not.
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* is not empty:UserWarning")
@pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning")
@pytest.mark.filterwarnings("ignore:.*could not find the monitored key:UserWarning")
@METHODS
def test_the_example_resumes_in_the_middle_of_an_epoch(method, command, root, tmp_path):
    base = ("fit", "--config", root / method.example, "--trainer.logger", "false")
    keep = (
        "--trainer.callbacks+=lightning.pytorch.callbacks.ModelCheckpoint",
        "--trainer.callbacks.every_n_train_steps=10",
        "--trainer.callbacks.save_top_k=-1",
        "--trainer.callbacks.filename=kept-{step}",
    )
    command(
        *base, "--trainer.max_steps", "40", *keep, f"--trainer.callbacks.dirpath={tmp_path}/all"
    )
    middle = tmp_path / "all" / "kept-step=10.ckpt"
    command(
        *base,
        *("--trainer.max_steps", "40", "--ckpt_path", middle, *keep),
        f"--trainer.callbacks.dirpath={tmp_path}/resumed",
    )
    through = weights(tmp_path / "all" / "kept-step=40.ckpt")
    resumed = weights(tmp_path / "resumed" / "kept-step=40.ckpt")
    assert through.keys() == resumed.keys()
    assert all(torch.equal(through[key], resumed[key]) for key in through)
    assert not all(torch.equal(through[key], weights(middle)[key]) for key in through)


@METHODS
def test_class_paths_of_the_example_are_public(method, root):
    text = (root / method.example).read_text()
    for plugin in method.plugins[:1]:
        assert f"class_path: {plugin.class_path}" in text
    assert hasattr(lightning_sgd, method.plugins[0].name)
