"""What the command adds to LightningCLI: a test after training, scheduler intervals, configs that can be fed back."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import yaml
from support.descent import BATCHES_PER_EPOCH, Witness

pytestmark = pytest.mark.slow


KEEP_BEST = (
    "--trainer.callbacks+=ModelCheckpoint",
    "--trainer.callbacks.monitor=val/loss",
    "--trainer.callbacks.filename=best",
)
LOG = (
    *("--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", "runs"),
    *("--trainer.logger.name", "descent"),
)


def logged(name, folder="runs/descent/version_0"):
    with (Path(folder) / "metrics.csv").open() as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


def config(folder="runs/descent/version_0"):
    return yaml.safe_load((Path(folder) / "config.yaml").read_text())


def test_the_test_uses_the_best_checkpoint_and_the_same_log(fit):
    # w falls by 3 an epoch: -3, -6, -9, -12; the validation loss |w + 6| is best after the second.
    fit(
        "--model.target=-6",
        "--trainer.max_epochs",
        "4",
        "--test_after_fit",
        "true",
        *LOG,
        *KEEP_BEST,
    )
    assert logged("val/loss") == [3, 0, 3, 6]
    assert logged("test/w") == [-6]


def test_a_checkpoint_chosen_by_a_metric_goes_before_one_that_is_merely_the_last(fit):
    plain = ("--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.filename=last")
    fit(
        "--model.target=-6",
        "--trainer.max_epochs",
        "4",
        "--test_after_fit",
        "true",
        *LOG,
        *plain,
        *KEEP_BEST,
    )
    assert logged("test/w") == [-6]


def test_without_a_checkpoint_the_last_weights_are_tested(fit):
    none = ("--trainer.enable_checkpointing", "false")
    fit("--model.target=-6", "--trainer.max_epochs", "4", "--test_after_fit", "true", *LOG, *none)
    assert logged("test/w") == [-12]


def test_nothing_is_tested_unless_asked_for(fit):
    fit("--trainer.max_epochs", "1", *LOG)
    assert logged("test/w") == []
    assert config()["test_after_fit"] is False


@pytest.mark.parametrize(
    ("words", "missing"),
    [
        ("--model Untested --data Numbers", "a test_step, and Untested has none"),
        ("--model Descent --data TrainingOnly", "a test_dataloader, and TrainingOnly has none"),
        ("--model Descent", "a test_dataloader, and Descent has none"),
    ],
)
def test_a_test_that_cannot_be_made_is_refused_before_training(command, capsys, words, missing):
    # After hours of training would be the wrong time to find out.
    with pytest.raises(SystemExit) as stop:
        command(
            "fit",
            *words.split(),
            "--seed_everything",
            "0",
            "--test_after_fit",
            "true",
            "--optimizer",
            "SGD",
        )
    assert stop.value.code == 2
    assert missing in capsys.readouterr().err.splitlines()[-1]


def test_an_error_while_training_keeps_its_traceback(fit):
    # One line would hide where training failed.
    with pytest.raises(ValueError, match="Expected `step` to be another, got 1"):
        fit("--model.failing_step", "1", "--trainer.max_epochs", "1", "--trainer.logger", "false")


@pytest.mark.filterwarnings("ignore:.*exists and is not empty:UserWarning")
def test_a_saved_config_can_be_fed_back_and_overwritten(fit, command):
    # A run with a fixed log folder is repeated by the same command.
    here = (*LOG, "--trainer.logger.version", "again")
    folder = "runs/descent/again"
    fit("--trainer.max_epochs", "2", "--test_after_fit", "true", *here, *KEEP_BEST)
    first, losses = config(folder), logged("train/loss", folder)
    command("fit", "--config", f"{folder}/config.yaml")
    assert config(folder) == first
    assert logged("train/loss", folder) == losses
    command("fit", "--config", f"{folder}/config.yaml", "--trainer.max_epochs", "1")
    assert config(folder)["trainer"]["max_epochs"] == 1
    assert len(logged("val/loss", folder)) == 1


@pytest.mark.parametrize("name", ["validate", "test", "predict"])
def test_a_config_saved_by_fit_serves_the_other_commands(fit, command, name):
    fit("--trainer.max_epochs", "1", "--test_after_fit", "true", *LOG)
    command(name, "--config", "runs/descent/version_0/config.yaml", "--trainer.logger", "false")


@pytest.mark.parametrize(
    ("scheduler", "halvings"), [("PerStepLR", 2 * BATCHES_PER_EPOCH), ("StepLR", 2)]
)
def test_a_scheduler_is_stepped_at_the_interval_that_it_asks_for(fit, scheduler, halvings):
    fit(
        *("--lr_scheduler", scheduler, "--lr_scheduler.step_size", "1"),
        *("--lr_scheduler.gamma", "0.5", "--trainer.max_epochs", "2", "--trainer.logger", "false"),
    )
    assert Witness.lr == 0.5**halvings


def test_reduce_on_plateau_watches_its_metric(fit):
    # |w - 0| grows from 3 to 6 to 7.5: no improvement after the first epoch, so the rate halves twice.
    fit(
        *("--lr_scheduler", "ReduceLROnPlateau", "--lr_scheduler.monitor", "val/loss"),
        *("--lr_scheduler.patience", "0", "--lr_scheduler.factor", "0.5"),
        *("--trainer.max_epochs", "3", "--trainer.logger", "false"),
    )
    assert Witness.lr == 0.25


@pytest.mark.parametrize(
    "model", ["BoringModel", "lightning.pytorch.demos.boring_classes.DemoModel"]
)
def test_lightnings_demo_models_are_known(command, capsys, model):
    with pytest.raises(SystemExit) as stop:
        command("fit", "--model", model, "--optimizer", "MaSS", "--print_config")
    assert stop.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["optimizer"]["class_path"] == "lightning_sgd.MaSS"
    assert printed["model"]["class_path"].startswith("lightning.pytorch.demos")


def test_the_help_of_a_class_names_its_arguments(command, capsys):
    with pytest.raises(SystemExit) as stop:
        command("fit", "--optimizer.help", "MaSS")
    assert stop.value.code == 0
    assert "--optimizer.kappa_tilde" in capsys.readouterr().out
