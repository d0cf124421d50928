"""Micro-batches of one device as workers."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback
from support.byzantine_training import (
    Silent,
    byzantine,
    finals,
)
from support.strategy_training import (
    Run,
    flat,
    loader,
    sgd,
)
from support.training import Regression, by_hand, loss_of, network, trainer
from torch.nn.utils import parameters_to_vector

import lightning_sgd
from lightning_sgd import (
    Mean,
)

pytestmark = [
    pytest.mark.timeout(60),
    pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning"),
]


class Alone(Callback):
    """Looks whether there is a process group."""

    def on_train_start(self, trainer, pl_module):
        assert not dist.is_initialized()


def test_micro_batches_of_one_device_need_no_process_group(tmp_path):
    # With the mean it is ordinary accumulation, also for the incomplete group at the end of an epoch.
    run = Run(
        tmp_path,
        byzantine(Mean(), workers="micro_batch"),
        ranks=1,
        callbacks=[Alone()],
        accumulate_grad_batches=3,
    )
    expected = parameters_to_vector(by_hand(sgd, accumulate=3)).detach()
    torch.testing.assert_close(finals(run)[0], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("entry", ["validate", "test", "predict"])
def test_one_device_evaluates_without_a_process_group(tmp_path, entry):
    class Evaluated(Regression):
        def validation_step(self, batch, batch_idx):
            assert not dist.is_initialized()
            return loss_of(self.net, batch)

        test_step = predict_step = validation_step

    of = lightning_sgd.ByzantineStrategy(workers="micro_batch")
    quiet = trainer(tmp_path, strategy=of)
    assert getattr(quiet, entry)(Evaluated(sgd), loader(1)) is not None


class BrokenBatches(Regression):
    """Every third batch is NaN."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * (math.nan if batch_idx % 3 == 1 else 1.0)


def test_a_broken_micro_batch_is_left_out(tmp_path):
    run = Run(
        tmp_path,
        byzantine("filter", 1, workers="micro_batch"),
        BrokenBatches(sgd),
        ranks=1,
        accumulate_grad_batches=3,
        limit_train_batches=6,
        callbacks=[Silent("1 of 3 workers may be wrong")],
    )
    net = network()
    optimizer = sgd(net.parameters())
    data = [batch for _ in range(2) for batch in list(loader(1))[:6]]
    for group in range(4):
        optimizer.zero_grad()
        for index in (0, 2):
            (loss_of(net, data[3 * group + index]) / 2).backward()
        optimizer.step()
    torch.testing.assert_close(finals(run)[0], flat(net), rtol=1e-5, atol=1e-6)


def test_an_incomplete_group_that_the_rule_cannot_judge_is_refused(tmp_path):
    strategy = byzantine("median", 1, workers="micro_batch")
    with pytest.raises(Exception, match="Set limit_train_batches to a multiple of 5"):
        Run(tmp_path, strategy, ranks=1, accumulate_grad_batches=5)
