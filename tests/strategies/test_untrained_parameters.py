"""Parameters that no optimizer trains belong to the common model too, where user code changes them."""

from __future__ import annotations

import copy

import pytest
import torch
from lightning.pytorch import Callback
from support.strategy_training import FORK, NUM_BATCHES, Run, loader, sgd, spread
from support.training import Regression, loss_of

from lightning_sgd import GossipPGAStrategy, LocalSGDStrategy, OverlapLocalSGDStrategy

pytestmark = pytest.mark.timeout(60)
AVERAGING = pytest.mark.parametrize(
    "strategy", [LocalSGDStrategy, GossipPGAStrategy, OverlapLocalSGDStrategy]
)


class Student(Regression):
    """Its teacher, outside the optimizer, follows the weights."""

    def __init__(self):
        super().__init__(sgd)
        self.teacher = copy.deepcopy(self.net).requires_grad_(False)
        self.validated = []

    def training_step(self, batch, batch_idx):
        for teacher, student in zip(self.teacher.parameters(), self.net.parameters(), strict=True):
            teacher.data.lerp_(student.data, 0.5)  # leaves the version counter as it is
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", loss_of(self.teacher, batch), sync_dist=True)

    def configure_optimizers(self):
        return sgd(self.net.parameters())


@AVERAGING
def test_the_end_has_the_mean_of_the_teachers(tmp_path, strategy):
    run = Run(tmp_path, strategy(period=4, **FORK), Student(), val=loader(2))
    half = len(run.trace[-1][0]) // 2
    teachers = [weights[half:] for weights in run.trace[-1]]
    finals = [record["final"] for record in run.ranks]
    assert spread(teachers) > 0
    assert spread(finals) == 0
    torch.testing.assert_close(finals[0][half:], sum(teachers) / 2, rtol=1e-6, atol=1e-7)


def test_validation_has_one_teacher_and_training_goes_on_with_each_ranks_own(tmp_path):
    # The period ends with the epoch: the weights are equal by then, the teachers are not.
    settings = {"period": NUM_BATCHES, **FORK}
    plain, run = (
        Run(
            tmp_path / str(num),
            LocalSGDStrategy(**settings),
            Student(),
            val=loader(2),
            limit_val_batches=num,
        )
        for num in (0, 1)
    )
    assert run.ranks[0]["validated"]
    for step in zip(*(record["validated"] for record in run.ranks), strict=True):
        assert spread(step) == 0
    assert all(
        torch.equal(a, b)
        for one, other in zip(plain.trace, run.trace, strict=True)
        for a, b in zip(one, other, strict=True)
    )


class Traffic(Callback):
    """Keeps what a rank has sent in the record of the other callback."""

    def on_fit_end(self, trainer, pl_module):
        recorder = trainer.callbacks[0]
        recorder.record["num_bytes"] = trainer.strategy.traffic.num_bytes
        recorder.write(trainer)


class Frozen(Regression):
    """A large layer that nobody changes."""

    def __init__(self, size):
        super().__init__(sgd)
        if size:
            self.frozen = torch.nn.Linear(size, size).requires_grad_(False)

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return sgd(self.net.parameters())


def test_frozen_layers_are_not_sent(tmp_path):
    sent = []
    for size in (0, 100):
        folder = tmp_path / str(size)
        strategy = LocalSGDStrategy(period=4, **FORK)
        run = Run(folder, strategy, Frozen(size), val=loader(2), callbacks=[Traffic()])
        sent.append(run.ranks[0]["num_bytes"])
    # Two hashes of 16 bytes at two validations and at the end.
    assert sent[1] - sent[0] <= 3 * 2 * 16 < 4 * 100**2
