"""Values that ranks log and buffers that they keep: a wrong rank does not reach evaluation and decisions."""

from __future__ import annotations

import math

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping
from support.byzantine_training import (
    SaveEvery,
    byzantine,
)
from support.callback_training import Classifier, digits
from support.strategy_training import (
    NUM_BATCHES,
    Run,
    loader,
    sgd,
    spread,
)
from support.training import Regression
from support.watching import assert_equal

pytestmark = [
    pytest.mark.timeout(60),
    pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning"),
]


class WrongBuffers(Classifier):
    """The statistics of one rank are ruined after every batch."""

    def __init__(self, rank=0):
        super().__init__(dropout=0.0)
        self.rank, self.seen = rank, []

    def on_after_backward(self):
        if self.global_rank == self.rank:
            for buffer in self.buffers():
                buffer.fill_(77)

    def on_validation_epoch_start(self):
        self.seen = [buffer.clone() for buffer in self.buffers()]

    def on_validation_end(self):
        torch.save(self.seen, f"{self.trainer.default_root_dir}/seen.{self.global_rank}")


@pytest.mark.parametrize("rule", ["median", "mean", "rank0", "local"])
def test_buffers_of_a_wrong_rank_do_not_reach_evaluation_and_checkpoints(tmp_path, rule):
    run = Run(
        tmp_path,
        byzantine(buffers=rule),
        WrongBuffers(),
        ranks=3,
        data=digits(3),
        max_epochs=1,
        limit_val_batches=1,
        callbacks=[SaveEvery(tmp_path)],
    )
    saved = torch.load(tmp_path / "5.ckpt", weights_only=True)
    names = [name for name, _ in Classifier().named_buffers()]
    written = [saved["state_dict"][name] for name in names]
    is_ruined = [bool((buffer == 77).all()) for buffer in written]
    assert all(is_ruined) == (rule in ("rank0", "local"))
    assert any(is_ruined) == (rule in ("rank0", "local"))
    seen = [torch.load(tmp_path / f"seen.{rank}") for rank in range(3)]
    if rule != "local":
        for other in seen[1:]:
            assert_equal(other, seen[0], "buffers in validation")
        assert (
            spread([torch.cat([b.double().flatten() for b in r["buffers"]]) for r in run.ranks])
            == 0
        )
    if rule == "median":
        own = [part["state_dict"] for part in saved["lightning_sgd"]["ranks"]]
        for name, buffer in zip(names, written, strict=True):
            parts = torch.stack([state[name].double() for state in own])
            expected = parts.median(dim=0).values if buffer.is_floating_point() else parts[1]
            assert torch.equal(buffer.double(), expected.float().double())


class Diary(Regression):
    """Logs a loss that is NaN on one rank."""

    def __init__(self, rank=1):
        super().__init__(sgd)
        self.rank = rank

    def validation_step(self, batch, batch_idx):
        value = math.nan if self.global_rank == self.rank else 1.0 + self.global_rank
        self.log("val_loss", value, sync_dist=True, batch_size=4)
        self.log("val_sum", value, sync_dist=True, reduce_fx="sum", batch_size=4)
        self.log("val_max", 1.0 * self.global_rank, sync_dist=True, reduce_fx="max")

    def on_validation_epoch_end(self):
        votes = [self.trainer.strategy.reduce_boolean_decision(self.global_rank == self.rank, all=a)
                 for a in (True, False)]  # fmt: skip
        assert votes == [False, not self.trainer.strategy.robust_metrics]

    def on_train_end(self):
        values = {key: float(value) for key, value in self.trainer.callback_metrics.items()}
        torch.save((values, self.trainer.current_epoch),
                   f"{self.trainer.default_root_dir}/{self.global_rank}.diary")  # fmt: skip


@pytest.mark.parametrize("is_robust", [False, True])
def test_one_rank_that_logs_nan_stops_nobody(tmp_path, is_robust):
    stop = EarlyStopping("val_loss", patience=10, check_finite=True)
    strategy = byzantine(robust_metrics=is_robust)
    Run(tmp_path, strategy, Diary(), ranks=4, val=loader(4), callbacks=[stop], max_epochs=3)
    for rank in range(4):
        values, epochs = torch.load(tmp_path / f"{rank}.diary")
        assert epochs == (3 if is_robust else 1)
        assert values["val_loss"] == pytest.approx(3.0 if is_robust else math.nan, nan_ok=True)
        assert values["val_max"] == 3.0
        if is_robust:
            batches = NUM_BATCHES
            assert values["val_sum"] == pytest.approx(4 * 3.0 * batches)
