"""Every optimizer of the catalogue under the Trainer, against the same training written out by hand."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from lightning.pytorch.callbacks import Callback, LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from support.training import (
    NUM_BATCHES,
    Regression,
    TwoOptimizers,
    batches,
    by_hand,
    loss_of,
    network,
    trainer,
)


def assert_same(ours, expected):
    for a, b in zip(ours, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.compatible("automatic optimization")
def test_automatic_optimization(make, tmp_path):
    module = Regression(make)
    trainer(tmp_path).fit(module, batches())
    assert_same(module.parameters(), by_hand(make))


@pytest.mark.compatible("gradient accumulation")
def test_accumulation_also_of_an_incomplete_group(make, tmp_path):
    module = Regression(make)
    trainer(tmp_path, accumulate_grad_batches=3).fit(module, batches())
    assert_same(module.parameters(), by_hand(make, accumulate=3))


@pytest.mark.compatible("gradient clipping")
@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_clipping(make, tmp_path, algorithm):
    clip = {
        "norm": partial(torch.nn.utils.clip_grad_norm_, max_norm=0.05),
        "value": partial(torch.nn.utils.clip_grad_value_, clip_value=0.01),
    }[algorithm]
    value = 0.05 if algorithm == "norm" else 0.01
    module = Regression(make)
    trainer(tmp_path, gradient_clip_val=value, gradient_clip_algorithm=algorithm).fit(
        module, batches()
    )
    assert_same(module.parameters(), by_hand(make, clip=clip))
    assert any(
        not torch.equal(a, b) for a, b in zip(module.parameters(), by_hand(make), strict=True)
    )


@pytest.mark.compatible("bf16-mixed precision")
def test_bf16_mixed(make, tmp_path):
    module = Regression(make)
    trainer(tmp_path, precision="bf16-mixed").fit(module, batches())
    autocast = partial(torch.autocast, "cpu", dtype=torch.bfloat16)
    assert_same(module.parameters(), by_hand(make, autocast=autocast))


class _Skips(Callback):
    """Counts the batches after which the weights had not moved, and looks at the state after the first."""

    def __init__(self):
        self.count, self.states = 0, []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.before = [p.detach().clone() for p in pl_module.parameters()]

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        now = pl_module.parameters()
        self.count += all(torch.equal(a, b) for a, b in zip(self.before, now, strict=True))
        self.states.append(len(trainer.optimizers[0].state))


@pytest.mark.compatible("16-mixed precision (GradScaler)")
def test_a_grad_scaler_that_skips_steps(make, tmp_path):
    # 2³⁰ overflows half precision for several steps: a skipped step must not touch weights or momentum.
    def scaler():
        return torch.amp.GradScaler("cpu", init_scale=2.0**30, growth_interval=1000)

    module, skips = Regression(make), _Skips()
    plugin = MixedPrecision("16-mixed", "cpu", scaler())
    trainer(tmp_path, plugins=[plugin], callbacks=[skips]).fit(module, batches())
    autocast = partial(torch.autocast, "cpu", dtype=torch.float16)
    assert_same(module.parameters(), by_hand(make, autocast=autocast, scaler=scaler()))
    assert 0 < skips.count < 2 * NUM_BATCHES
    assert skips.states[0] == 0


@pytest.mark.compatible("manual optimization, two optimizers")
def test_manual_optimization_with_two_optimizers(make, tmp_path):
    module = TwoOptimizers(make)
    trainer(tmp_path).fit(module, batches())

    net = network()
    first, last = make(net[0].parameters()), make(net[2].parameters())
    for _ in range(2):
        for index, batch in enumerate(batches()):
            loss_of(net, batch).backward()
            first.step()
            first.zero_grad()
            if index % 2:
                last.step()
                last.zero_grad()
    assert_same(module.net.parameters(), net.parameters())


@pytest.mark.compatible("learning-rate schedulers")
def test_schedules_reach_the_optimizer(make, tmp_path):
    module = Regression(make, schedule=partial(torch.optim.lr_scheduler.StepLR, step_size=1))
    trainer(tmp_path).fit(module, batches())

    net = network()
    optimizer = make(net.parameters())
    for epoch in range(2):
        optimizer.param_groups[0]["lr"] *= 0.1 if epoch else 1.0
        for batch in batches():
            loss_of(net, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert_same(module.parameters(), net.parameters())


def test_learning_rate_monitor_reads_every_group(make, tmp_path):
    # It indexes weight_decay in every group and fails on optimizers without it.
    monitor = LearningRateMonitor("step", log_weight_decay=True)
    module = Regression(make, schedule=partial(torch.optim.lr_scheduler.StepLR, step_size=1))
    trainer(tmp_path, logger=CSVLogger(tmp_path), callbacks=[monitor], log_every_n_steps=1).fit(
        module, batches()
    )
    name = f"lr-{type(make(network().parameters())).__name__}"
    assert set(monitor.lrs) == {name}
    assert set(monitor.last_weight_decay_values) == {f"{name}-weight_decay"}
