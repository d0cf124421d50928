"""The command as a function, in an empty folder."""

from __future__ import annotations

import sys

import pytest
from support import descent

from lightning_sgd.cli import main

QUIET = [
    *("--seed_everything", "0", "--trainer.accelerator", "cpu", "--trainer.devices", "1"),
    *("--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"),
    *("--trainer.log_every_n_steps", "1", "--trainer.num_sanity_val_steps", "0"),
]
LOG = [
    *("--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", "runs"),
    *("--trainer.logger.name", "descent"),
]


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Run ``lightning-sgd`` in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-sgd"])
    # LightningCLI itself uses a method that jsonargparse has deprecated.
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    return lambda *words: main([str(word) for word in words])


@pytest.fixture
def fit(command):
    """Train the model whose weight falls by 1 in every step."""

    def run(*words):
        descent.Witness.lr = None
        command(
            *("fit", "--model", "Descent", "--data", "Numbers"),
            *("--optimizer", "SGD", "--optimizer.lr", "1.0", "--trainer.callbacks+=Witness"),
            *QUIET,
            *words,
        )

    return run


@pytest.fixture
def complaint(command, capsys):
    """The one line that a mistake is answered with."""

    def run(*words):
        with pytest.raises(SystemExit) as stop:
            command(*words)
        captured = capsys.readouterr()
        assert stop.value.code == 2
        assert captured.out == ""
        assert captured.err.endswith("\n")
        assert captured.err.count("\n") == 1, "one line, no traceback, no usage"
        prefix = "lightning-sgd: error: "
        assert captured.err.startswith(prefix)
        return captured.err.removeprefix(prefix).rstrip("\n")

    return run
