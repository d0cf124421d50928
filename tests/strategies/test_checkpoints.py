"""Checkpoints of every strategy: exact resume on as many ranks, an ordinary checkpoint for everybody else."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from support.callback_training import Classifier, digits
from support.strategy_training import Run, flat, sgd, spread
from support.training import Regression, trainer
from support.watching import assert_equal

from lightning_sgd.strategies._base.checkpoint_format import (
    KEY,
    for_rank,
    mean_of_states,
    random_states,
    set_random_states,
)

pytestmark = [
    pytest.mark.timeout(60),
    # The resumed run keeps its files apart on purpose.
    pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning"),
]
STEPS, INTERRUPTED_AT = 14, 5


class SaveEvery(Callback):
    """Writes a checkpoint after every step, on all ranks as the Trainer wants it."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_batch_end(self, trainer, *_):
        trainer.save_checkpoint(f"{self.folder}/{trainer.global_step}.ckpt")


def fit(make, folder, ranks, resume=None, callbacks=(), **settings):
    return Run(
        folder,
        make(),
        Classifier(dropout=0.1),
        ranks=ranks,
        data=digits(ranks),
        resume=resume,
        callbacks=[*callbacks, SaveEvery(folder)],  # last, as Lightning does
        **{"max_epochs": -1, "max_steps": STEPS, "limit_val_batches": 2, **settings},
    )


def content(file):
    return torch.load(file, weights_only=True)


def parts_of(saved):
    """What each rank goes on from; strategies with equal replicas write what all have in common once."""
    common = saved["state_dict"]
    for part in saved[KEY]["ranks"]:
        yield {**saved, **part, "state_dict": {**common, **part["state_dict"]}}


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.compatible("exact resume in mid-epoch (1, 2 and 4 ranks)")
def test_resume_is_bit_exact_for_every_rank(make, tmp_path, world_size):
    # With dropout: each rank's generators go on too.
    validation = {"val_check_interval": 3}
    through = fit(make, tmp_path / "through", world_size, **validation)
    middle = tmp_path / "through" / f"{INTERRUPTED_AT}.ckpt"
    torch.manual_seed(1)
    resumed = fit(make, tmp_path / "resumed", world_size, resume=middle, **validation)
    for ours, expected in zip(resumed.ranks, through.ranks, strict=True):
        rest = expected["trace"][INTERRUPTED_AT:]
        assert len(ours["trace"]) == len(rest) == STEPS - INTERRUPTED_AT
        assert all(map(torch.equal, ours["trace"], rest))
        assert_equal(ours["final"], expected["final"], "the end")
        assert_equal(ours["optimizers"], expected["optimizers"], "the optimizer")
        assert_equal(ours["buffers"], expected["buffers"], "the buffers")
    both = (content(tmp_path / name / f"{STEPS}.ckpt") for name in ("resumed", "through"))
    ours, expected = ([part["state_dict"] for part in parts_of(c)] for c in both)
    assert_equal(ours, expected, "the checkpoint at the end")


@pytest.mark.compatible("exact resume, two optimizers")
def test_resume_with_two_optimizers(make, tmp_path):
    class Manual(Classifier):
        def __init__(self):
            super().__init__(dropout=0.0)
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            first, last = self.optimizers()
            self.manual_backward(super().training_step(batch, batch_idx))
            for optimizer in [first, last] if batch_idx % 2 else [first]:
                optimizer.step()
                optimizer.zero_grad()

        def configure_optimizers(self):
            parts = self.net[:-1], self.net[-1]
            return tuple(sgd(part.parameters()) for part in parts)

    def run(name, resume=None):
        folder = tmp_path / name
        saving = [SaveEvery(folder)]
        data, settings = digits(2), {"max_epochs": 2, "limit_val_batches": 0}
        return Run(folder, make(), Manual(), data=data, resume=resume, callbacks=saving, **settings)

    through = run("through")
    resumed = run("resumed", tmp_path / "through" / "6.ckpt")
    for ours, expected in zip(resumed.ranks, through.ranks, strict=True):
        assert_equal(ours["final"], expected["final"], "the end")
        assert ours["replica_steps"] == expected["replica_steps"]


@pytest.mark.compatible("checkpoints that load without us")
def test_the_checkpoint_is_an_ordinary_one(make, tmp_path):
    run = fit(make, tmp_path, 2, limit_val_batches=0)
    for step, weights in enumerate(run.trace, start=1):
        module = Classifier()
        saved = content(tmp_path / f"{step}.ckpt")
        module.load_state_dict(saved["state_dict"])
        mean = torch.stack(weights).double().mean(dim=0).float()
        torch.testing.assert_close(flat(module), mean, rtol=1e-6, atol=1e-7)
        for rank, part in enumerate(parts_of(saved)):
            module.load_state_dict(part["state_dict"])
            assert torch.equal(flat(module), weights[rank])
    plain = trainer(tmp_path / "plain", max_epochs=-1, max_steps=STEPS + 1, num_sanity_val_steps=0)
    plain.fit(Classifier(), datamodule=digits(), ckpt_path=tmp_path / f"{STEPS}.ckpt")
    assert plain.global_step == STEPS + 1


@pytest.mark.compatible("restart on another number of ranks")
def test_another_number_of_ranks_starts_from_the_mean_with_one_warning(make, tmp_path):
    fit(make, tmp_path / "four", 4, limit_val_batches=0)
    middle = tmp_path / "four" / f"{INTERRUPTED_AT}.ckpt"
    saved = content(middle)

    class First(Callback):
        def on_train_start(self, trainer, pl_module):
            state = dict(pl_module.state_dict()), trainer.optimizers[0].state_dict()
            torch.save(state, f"{tmp_path}/first.{trainer.global_rank}")

    with pytest.warns(UserWarning, match="is of 4 ranks, this is a training on 2: every rank"):
        for_rank(saved, 0, 2)
    with pytest.raises(Exception, match="is of 4 ranks, this is a training on 2"):
        fit(make, tmp_path / "raised", 2, resume=middle)  # warnings are errors here
    fit(make, tmp_path / "two", 2, resume=middle, callbacks=[First(), Silent()])
    momenta = [part["optimizer_states"][0]["state"] for part in parts_of(saved)]
    for rank in range(2):
        weights, optimizer = content(f"{tmp_path}/first.{rank}")
        assert_equal(weights, dict(saved["state_dict"]), "the weights at the start")
        for index, state in optimizer["state"].items():
            mean = torch.stack([m[index]["momentum_buffer"] for m in momenta]).mean(dim=0)
            torch.testing.assert_close(state["momentum_buffer"], mean)


class Silent(Callback):
    """Lets a warning be a warning in the forked processes."""

    def __init__(self):
        import warnings

        warnings.filterwarnings("ignore", "The checkpoint is of")


@pytest.mark.compatible("ModelCheckpoint: monitored, last, in validation")
def test_model_checkpoint_writes_the_mean_wherever_it_writes(make, tmp_path):
    # In the middle of an epoch it writes during validation, with the mean in place of the weights.
    best = ModelCheckpoint(
        tmp_path / "files",
        "{step}",
        monitor="val/accuracy",
        mode="max",
        save_top_k=-1,
        save_last=True,
    )
    run = fit(make, tmp_path, 2, val_check_interval=3, callbacks=[best], enable_checkpointing=True)
    files = sorted((tmp_path / "files").glob("step=*.ckpt"))
    assert len(files) == 4
    for file in files:
        saved = content(file)
        step = saved["global_step"]
        weights = run.trace[step - 1]
        module = Classifier()
        module.load_state_dict(saved["state_dict"])
        mean = torch.stack(weights).double().mean(dim=0).float()
        torch.testing.assert_close(flat(module), mean, rtol=1e-6, atol=1e-7)
        module.load_state_dict([*parts_of(saved)][1]["state_dict"])
        assert torch.equal(flat(module), weights[1])
    assert content(tmp_path / "files" / "last.ckpt")["global_step"] == 13


@pytest.mark.compatible("weights only")
def test_weights_only_checkpoints_hold_the_mean_alone(make, tmp_path):
    weights = ModelCheckpoint(
        tmp_path / "files", every_n_train_steps=4, save_top_k=-1, save_weights_only=True
    )
    fit(make, tmp_path, 2, callbacks=[weights], enable_checkpointing=True)
    for file in (tmp_path / "files").glob("*.ckpt"):
        assert KEY not in content(file)


@pytest.mark.compatible("WeightAveraging")
def test_weight_averaging_beside_it_resumes_exactly(make, tmp_path):
    def ema():
        return [EMAWeightAveraging(decay=0.5)]

    through = fit(make, tmp_path / "through", 2, callbacks=ema(), val_check_interval=3)
    middle = tmp_path / "through" / f"{INTERRUPTED_AT}.ckpt"
    resumed = fit(
        make, tmp_path / "resumed", 2, resume=middle, callbacks=ema(), val_check_interval=3
    )
    for ours, expected in zip(resumed.ranks, through.ranks, strict=True):
        assert all(map(torch.equal, ours["trace"], expected["trace"][INTERRUPTED_AT:]))
        assert_equal(ours["final"], expected["final"], "the end")
    saved = content(middle)
    averages = [part["state_dict"]["net.1.weight"] for part in parts_of(saved)]
    torch.testing.assert_close(saved["state_dict"]["net.1.weight"], sum(averages) / 2)
    assert (spread(averages) > 0) == (spread(through.trace[INTERRUPTED_AT - 1]) > 0)
    assert spread([record["final"] for record in resumed.ranks]) == 0.0


def test_entries_that_somebody_took_out_stay_out(make, tmp_path):
    # Adapters keep the frozen weights out of their checkpoints.
    class Adapter(Regression):
        strict_loading = False

        def on_save_checkpoint(self, checkpoint):
            del checkpoint["state_dict"]["net.0.weight"]

    Run(tmp_path, make(), Adapter(sgd), callbacks=[SaveEvery(tmp_path)])
    saved = content(tmp_path / "5.ckpt")
    for state in (saved["state_dict"], *(part["state_dict"] for part in parts_of(saved))):
        assert sorted(state) == ["net.0.bias", "net.2.bias", "net.2.weight"]


def test_nothing_but_plain_containers_is_written(make, tmp_path):
    fit(make, tmp_path, 2, limit_val_batches=0)
    keys = set(content(tmp_path / "3.ckpt")[KEY])
    assert keys - {"shared"} == {"version", "num_ranks", "ranks"}


def test_a_checkpoint_of_another_strategy_is_taken_as_it_is(make, tmp_path):
    fit(lambda: "auto", tmp_path / "plain", 1, limit_val_batches=0)
    middle = tmp_path / "plain" / f"{INTERRUPTED_AT}.ckpt"
    run = fit(make, tmp_path / "ours", 2, resume=middle, limit_val_batches=0)
    assert spread([record["final"] for record in run.ranks]) == 0.0


def draw():
    """One number of each global generator."""
    return float(torch.rand(())), np.random.rand(), random.random()  # noqa: NPY002  # users do


def test_generators_go_on_where_they_were():
    states = random_states()
    drawn = draw()
    set_random_states(states)
    assert draw() == drawn
    assert draw() != drawn


def test_the_mean_of_nested_states():
    states = [
        {"state": {0: {"m": torch.tensor([1.0, 3.0]), "step": torch.tensor(7.0)}}, "lr": [0.1]},
        {"state": {0: {"m": torch.tensor([2.0, 5.0]), "step": torch.tensor(7.0)}}, "lr": [0.1]},
        {"state": {0: {"m": torch.tensor([6.0, 1.0]), "step": torch.tensor(7.0)}}, "lr": [0.1]},
    ]
    mean = mean_of_states(states)
    assert mean["lr"] == [0.1]
    assert torch.equal(mean["state"][0]["m"], torch.tensor([3.0, 3.0]))
    assert torch.equal(mean["state"][0]["step"], torch.tensor(7.0))
