"""Every learning-rate scheduler of the catalogue under the Trainer and in LightningCLI's YAML."""

from __future__ import annotations

import csv
import sys
from functools import partial

import pytest
import torch
import yaml
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger
from support.schedules import advance, sgd
from support.settings import SETTINGS
from support.training import NUM_BATCHES, Regression, batches, loss_of, network, trainer
from support.watching import assert_equal

from lightning_sgd import DigitsClassifier, DigitsDataModule
from lightning_sgd.cli import main

STEPS, INTERRUPTED_AT = 14, 5
SGD = partial(torch.optim.SGD, lr=0.1)


class Scheduled(Regression):
    """Trained by plain SGD with the scheduler under test, at some interval; its first layer is a group of its own."""

    def __init__(self, make, **config):
        super().__init__(SGD)
        self.make_schedule, self.config = make, config

    def configure_optimizers(self):
        groups = [
            {"params": self.net[0].parameters(), "lr": 0.05, "name": "body"},
            {"params": self.net[2].parameters(), "lr": 0.1, "name": "head"},
        ]
        optimizer = torch.optim.SGD(groups)
        schedule = {"scheduler": self.make_schedule(optimizer), **self.config}
        return {"optimizer": optimizer, "lr_scheduler": schedule}


class StepSizes(Callback):
    """The step sizes of every step, as the step uses them."""

    def __init__(self):
        self.seen = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.seen.append([float(group["lr"]) for group in optimizer.param_groups])


@pytest.mark.compatible("interval: step and interval: epoch")
@pytest.mark.parametrize("interval", ["step", "epoch"])
def test_intervals(make, tmp_path, interval):
    # Weights, against the same training written out by hand.
    per_call = 1 if interval == "step" else NUM_BATCHES
    module = Scheduled(partial(make, num_steps_per_call=per_call), interval=interval)
    sizes = StepSizes()
    trainer(tmp_path, callbacks=[sizes]).fit(module, batches())

    planned = advance(make(sgd(0.05, 0.1), num_steps_per_call=per_call), 2 * NUM_BATCHES)
    net, expected = network(), []
    for step in range(2 * NUM_BATCHES):
        expected.append(planned[step if interval == "step" else step // NUM_BATCHES])
    for step, lrs in enumerate(expected):
        loss_of(net, list(batches())[step % NUM_BATCHES]).backward()
        with torch.no_grad():
            for layer, lr in zip((net[0], net[2]), lrs, strict=True):
                for param in layer.parameters():
                    param.sub_(param.grad, alpha=lr)
                    param.grad = None
    assert sizes.seen == expected
    for a, b in zip(module.parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.compatible("gradient accumulation")
def test_accumulated_batches_are_one_step(make, tmp_path):
    sizes = StepSizes()
    module = Scheduled(make, interval="step")
    trainer(tmp_path, callbacks=[sizes], accumulate_grad_batches=3).fit(module, batches())
    assert sizes.seen == advance(make(sgd(0.05, 0.1)), 5)  # 7 batches are 3 steps, twice


@pytest.mark.compatible("manual optimization, two optimizers")
def test_manual_optimization(make, tmp_path):
    class Manual(Scheduled):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss_of(self.net, batch))
            optimizer.step()
            self.lr_schedulers().step()

    sizes = StepSizes()
    trainer(tmp_path, callbacks=[sizes]).fit(Manual(make), batches())
    assert sizes.seen == advance(make(sgd(0.05, 0.1)), 2 * NUM_BATCHES - 1)


def test_learning_rate_monitor_logs_what_is_used(make, tmp_path):
    sizes, logger = StepSizes(), CSVLogger(tmp_path, name="", version="")
    callbacks = [sizes, LearningRateMonitor("step")]
    trainer(tmp_path, callbacks=callbacks, logger=logger, log_every_n_steps=1).fit(
        Scheduled(make, interval="step", name="schedule"), batches()
    )
    with (tmp_path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    logged = [[float(row[f"schedule/{name}"]) for name in ("body", "head")] for row in rows]
    torch.testing.assert_close(torch.tensor(logged), torch.tensor(sizes.seen), rtol=1e-6, atol=0)


def fit(make, folder, resume_from=None):
    """Train on the digits for a fixed number of steps; keep a checkpoint after each."""

    class Classifier(DigitsClassifier):
        def configure_optimizers(self):
            optimizer = SGD(self.parameters())
            schedule = {"scheduler": make(optimizer), "interval": "step"}
            return {"optimizer": optimizer, "lr_scheduler": schedule}

    torch.manual_seed(0)
    checkpoints = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
    trainer(
        folder,
        max_epochs=-1,
        max_steps=STEPS,
        enable_checkpointing=True,
        callbacks=[checkpoints],
        accumulate_grad_batches=2,
        val_check_interval=3,
    ).fit(
        Classifier(), datamodule=DigitsDataModule(num_val=897, num_test=500), ckpt_path=resume_from
    )
    return [
        torch.load(folder / f"step={step}.ckpt", weights_only=True)
        for step in range(1 if resume_from is None else INTERRUPTED_AT + 1, STEPS + 1)
    ]


# The resumed run keeps its files apart on purpose.
@pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning")
@pytest.mark.compatible("exact resume in mid-epoch (1 rank)")
def test_resume_in_the_middle_of_an_epoch_is_bit_exact(make, tmp_path):
    through = fit(make, tmp_path / "through")
    middle = tmp_path / "through" / f"step={INTERRUPTED_AT}.ckpt"
    resumed = fit(make, tmp_path / "resumed", middle)
    for ours, expected in zip(resumed, through[INTERRUPTED_AT:], strict=True):
        for part in ("state_dict", "optimizer_states", "lr_schedulers"):
            assert_equal(ours[part], expected[part], part)
    sizes = [content["optimizer_states"][0]["param_groups"][0]["lr"] for content in through]
    assert len(set(sizes)) > 1, "a step size that never changes resumes whatever is saved"


CONFIG = """
seed_everything: 0
model: {class_path: lightning_sgd.DigitsClassifier}
data: {class_path: lightning_sgd.DigitsDataModule}
optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.1}}
trainer: {accelerator: cpu, max_steps: 6, logger: false, enable_checkpointing: false, enable_progress_bar: false,
          enable_model_summary: false, limit_val_batches: 0}
"""


@pytest.fixture
def config(plugin, tmp_path, monkeypatch):
    """A config file with the lines of the scheduler."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-sgd"])
    settings = {"class_path": plugin.class_path, "init_args": _as_yaml(SETTINGS[plugin.name])}
    file = tmp_path / "settings.yaml"
    file.write_text(CONFIG + yaml.safe_dump({"lr_scheduler": settings}))
    return file


def _as_yaml(settings):
    return {
        key: _vars_of(value) if hasattr(value, "__dataclass_fields__") else value
        for key, value in settings.items()
    }


def _vars_of(record):
    return {name: getattr(record, name) for name in record.__dataclass_fields__}


@pytest.mark.compatible("LightningCLI YAML")
def test_our_command_steps_it_at_its_interval(make, config, monkeypatch):
    sizes = _watch(monkeypatch)
    main(["fit", "--config", str(config)])
    assert sizes == advance(make(sgd(0.1)), 5)


@pytest.mark.compatible("LightningCLI YAML")
def test_an_ordinary_lightning_cli_steps_it_once_per_epoch(make, config, monkeypatch):
    # Lightning's own CLI knows no interval: a user has to set num_steps_per_call.
    sizes = _watch(monkeypatch)
    LightningCLI(args=["fit", "--config", str(config)])
    assert sizes == 6 * advance(make(sgd(0.1)), 0)


@pytest.mark.compatible("LightningCLI YAML")
def test_the_printed_config_is_the_config(plugin, config, capsys, tmp_path):
    printed = []
    for file in (config, tmp_path / "again.yaml"):
        with pytest.raises(SystemExit) as stop:
            main(["fit", "--config", str(file), "--print_config"])
        assert stop.value.code == 0
        printed.append(capsys.readouterr().out)
        (tmp_path / "again.yaml").write_text(printed[0])
    assert yaml.safe_load(printed[0]) == yaml.safe_load(printed[1])
    assert f"class_path: {plugin.class_path}" in printed[0]


def _watch(monkeypatch):
    """The step sizes of all training steps that follow."""
    sizes = []

    def note(self, optimizer):
        sizes.append([float(group["lr"]) for group in optimizer.param_groups])

    monkeypatch.setattr(DigitsClassifier, "on_before_optimizer_step", note, raising=False)
    return sizes
