"""Ranks without a loss, parameters without a gradient, and losses that overflow."""

from __future__ import annotations

import math

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.plugins.precision import MixedPrecision
from support.byzantine_training import (
    Silent,
    assert_follows,
    byzantine,
    finals,
    simulate,
)
from support.strategy_training import (
    NUM_BATCHES,
    Run,
    flat,
    sgd,
    spread,
)
from support.training import Regression

from lightning_sgd import (
    Mean,
)

pytestmark = [
    pytest.mark.timeout(60),
    pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning"),
]


class Skipping(Regression):
    """Some ranks have no loss in some batches."""

    def __init__(self, ranks):
        super().__init__(sgd)
        self.ranks = ranks

    def training_step(self, batch, batch_idx):
        if self.global_rank in self.ranks and batch_idx % 2:
            return None
        return super().training_step(batch, batch_idx)


def test_a_rank_without_a_loss_is_left_out_of_the_step(tmp_path):
    # Lightning refuses that with DDP, because it would wait for ever.
    steps = iter(range(2 * NUM_BATCHES))

    def combine(gradients):
        is_even = next(steps) % NUM_BATCHES % 2 == 0
        return (gradients if is_even else gradients[[0, 2, 3]]).mean(dim=0)

    run = Run(tmp_path, byzantine(Mean()), Skipping([1]), ranks=4)
    assert_follows(run, simulate(4, combine))


def test_one_rank_without_a_loss_is_as_with_lightning_alone(tmp_path):
    silent = Silent("`training_step` returned `None`")
    ours = Run(tmp_path / "ours", byzantine(), Skipping([0]), ranks=1, callbacks=[silent])
    theirs = Run(tmp_path / "theirs", "auto", Skipping([0]), ranks=1, callbacks=[silent])
    assert torch.equal(finals(ours)[0], finals(theirs)[0])


def test_without_a_loss_on_any_rank_there_is_no_step(tmp_path):
    silent = Silent("No step was taken")
    run = Run(tmp_path, byzantine(), Skipping([0, 1]), callbacks=[silent])
    for index, (before, after) in enumerate(zip(run.trace, run.trace[1:], strict=False), start=1):
        assert torch.equal(before[0], after[0]) == bool(index % NUM_BATCHES % 2)


class Rare(Regression):
    """One rank alone has gradients of the second layer."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        hidden = self.net[1](self.net[0](x))
        out = self.net[2](hidden) if self.global_rank == 1 else hidden.sum(dim=1, keepdim=True)
        return torch.nn.functional.mse_loss(out, y)


@pytest.mark.parametrize("num_byzantine", [0, 1])
def test_a_parameter_that_no_honest_rank_need_have_used_gets_no_gradient(tmp_path, num_byzantine):
    run = Run(tmp_path, byzantine("median", num_byzantine), Rare(sgd), ranks=4)
    moved = finals(run)[0] != flat(Regression(sgd))
    assert bool(moved[-9:].any()) == (num_byzantine == 0)  # weight decay would move it
    assert moved[:40].all()


class Overflowing(Regression):
    """One rank has an infinite loss in its third batch."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        overflows = (self.global_rank, batch_idx) == (1, 2)
        return loss * (math.inf if overflows else 1.0)


class Scales(Callback):
    """Writes down the loss scale."""

    def __init__(self, folder):
        self.folder = folder

    def on_fit_end(self, trainer, pl_module):
        scale = trainer.precision_plugin.scaler.get_scale()
        torch.save(scale, f"{self.folder}/scale.{trainer.global_rank}")


@pytest.mark.parametrize("num_byzantine", [0, 1])
@pytest.mark.parametrize("beta", [0.0, 0.9])
def test_one_overflow_is_filtered_or_halves_the_scale_of_all_ranks(tmp_path, num_byzantine, beta):
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1000)
    precision = MixedPrecision("16-mixed", "cpu", scaler)
    strategy = byzantine("median", num_byzantine, worker_momentum=beta)
    settings = {"plugins": [precision], "callbacks": [Scales(tmp_path)], "max_epochs": 1}
    run = Run(tmp_path, strategy, Overflowing(sgd), ranks=4, **settings)
    scales = [torch.load(f"{tmp_path}/scale.{rank}") for rank in range(4)]
    assert scales == [8.0 if num_byzantine else 4.0] * 4
    assert all(spread(weights) == 0.0 for weights in run.trace)
    assert finals(run)[0].isfinite().all()
    assert torch.equal(run.trace[1][0], run.trace[2][0]) == (num_byzantine == 0)


def test_momentum_and_radii_do_not_depend_on_the_loss_scale(tmp_path):
    def run(scale):
        precision = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale))
        strategy = byzantine("cclip(radius=0.05)", 1, worker_momentum=0.9)
        return finals(Run(tmp_path / str(scale), strategy, ranks=4, plugins=[precision]))[0]

    torch.testing.assert_close(run(64.0), run(1.0), rtol=2e-2, atol=1e-3)
