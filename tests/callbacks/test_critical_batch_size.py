"""CriticalBatchSizeMonitor on gradients whose noise scale is known, from all sources; what it says and recommends."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from lightning.pytorch import LightningModule
from support.callback_checks import Subject, compare
from support.strategy_training import FORK, ddp
from support.training import Regression, TwoOptimizers, batches, loss_of, trainer
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_sgd import CriticalBatchSizeMonitor, LocalSGDStrategy
from lightning_sgd.callbacks.critical_batch_size_monitor import (
    describe_noise_scale,
    recommend_batch_size,
)
from lightning_sgd.functional.noise.noise_scale import NoiseScale


def sgd(params):
    return torch.optim.SGD(params, lr=0.1)


def watch(**settings):
    defaults = {"every_n_steps": 1, "max_overhead": None, "save_figure": False}
    return CriticalBatchSizeMonitor(**{**defaults, **settings})


SIZE, NUM = 300, 4096


def data(strength=0.3):
    """Samples whose gradients they are: a mean, and noise that differs between coordinates."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(NUM, SIZE, generator=generator) * torch.linspace(0.1, 2, SIZE)
    return x + strength * torch.linspace(-1, 1, SIZE)


def exact(x):
    """The noise scale of the data set itself."""
    return float(x.var(dim=0).sum() / x.mean(dim=0).square().sum())


class Linear(LightningModule):
    """The gradient is the mean of the samples of a batch, whatever the weights."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(SIZE - 100))
        self.rest = torch.nn.Parameter(torch.zeros(100))

    def training_step(self, batch):
        return (torch.cat([self.weight, self.rest]) * batch[0]).sum(dim=1).mean()

    def configure_optimizers(self):
        return sgd(self.parameters())


def fit(tmp_path, monitor, x, batch_size=8, num_steps=20, **settings):
    loader = DataLoader(TensorDataset(x), batch_size)
    run = trainer(tmp_path, callbacks=[monitor], max_steps=num_steps, max_epochs=-1, **settings)
    run.fit(Linear(), loader)
    return {key: float(value) for key, value in run.callback_metrics.items()}


# What it measures


@pytest.mark.parametrize(
    ("settings", "of_trainer"),
    [
        ({"num_batches": 16}, {}),
        ({"num_batches": 16, "batch_size": 2}, {}),
        ({"source": "microbatches"}, {"accumulate_grad_batches": 16}),
    ],
    ids=["extra", "small batches", "micro-batches"],
)
def test_the_noise_scale_of_known_gradients(tmp_path, settings, of_trainer):
    x, monitor = data(), watch(num_coordinates=None, window=20, **settings)
    found = fit(tmp_path, monitor, x, **of_trainer)
    value, low, high = (
        found[f"critical_batch_size/{name}"] for name in ("noise_scale", "low", "high")
    )
    assert low < exact(x) < high
    assert value == pytest.approx(exact(x), rel=0.15)
    assert high / low < 1.6
    traces, squares = (
        torch.tensor(monitor.values[name]) for name in ("noise_trace", "gradient_sq")
    )
    assert traces[-20:].mean() == pytest.approx(float(x.var(dim=0).sum()), rel=0.05)
    assert squares[-20:].mean() == pytest.approx(float(x.mean(dim=0).square().sum()), rel=0.1)
    assert value == pytest.approx(float(traces[-20:].sum() / squares[-20:].sum()), rel=1e-5)


@pytest.mark.parametrize("strategy", [ddp, lambda: LocalSGDStrategy(period=2, **FORK)])
@pytest.mark.timeout(60)
def test_two_gradients_of_two_ranks_are_enough_over_many_steps(tmp_path, caplog, strategy):
    # The whole point: the answer for no cost at all, where data is trained on in parallel anyway.
    x, monitor = data(strength=1.0), watch(source="ranks", window=100)
    settings = {"devices": 2, "strategy": strategy()}
    found = fit(tmp_path, monitor, x, num_steps=100, **settings)
    low, high = (found[f"critical_batch_size/{name}"] for name in ("low", "high"))
    assert found["critical_batch_size/noise_scale"] == pytest.approx(exact(x), rel=0.06)
    assert high / low < 1.2


def test_layers_are_measured_on_their_own(tmp_path):
    x, monitor = data(), watch(num_coordinates=None, window=20, log_layers=True)
    found = fit(tmp_path, monitor, x)
    for name, part in (("weight", slice(0, 200)), ("rest", slice(200, 300))):
        value = found[f"critical_batch_size/noise_scale/{name}"]
        assert value == pytest.approx(exact(x[:, part]), rel=0.3)


def test_a_sketch_tells_the_same(tmp_path):
    x = data()
    values = [
        fit(tmp_path, watch(num_coordinates=width), x)["critical_batch_size/noise_scale"]
        for width in (None, 200)
    ]
    assert values[1] == pytest.approx(values[0], rel=0.2)
    assert values[1] != values[0]


def test_the_window_forgets(tmp_path):
    monitor = watch(num_coordinates=None, window=1)
    fit(tmp_path, monitor, data())
    ratios = [
        trace / square
        for trace, square in zip(
            monitor.values["noise_trace"], monitor.values["gradient_sq"], strict=True
        )
    ]
    assert monitor.values["noise_scale"] == pytest.approx(ratios)
    assert monitor.times == list(range(21))


def test_where_nothing_but_noise_is_seen_the_value_is_infinite_and_the_bound_is_not(tmp_path):
    x = data(strength=0.0)
    monitor = watch()
    found = fit(tmp_path, monitor, x - x.mean(dim=0), num_steps=3)
    assert found["critical_batch_size/high"] == math.inf
    assert 100 < found["critical_batch_size/low"] < found["critical_batch_size/noise_scale"]
    scale = monitor.noise_scale
    assert recommend_batch_size(scale, 8).startswith(
        ", above the 8 of a step: a larger batch pays. "
    )


# Training does not notice


MICRO = Subject(lambda **s: watch(source="microbatches", log_layers=True, **s))


@pytest.mark.parametrize("settings", [{}, {"precision": "bf16-mixed"}], ids=["float32", "bf16"])
def test_training_is_unchanged_by_the_gradients_of_micro_batches(tmp_path, settings):
    # With passes of its own, the suite for all callbacks says the same.
    with_it, _ = compare(MICRO, tmp_path, accumulate_grad_batches=3, **settings)
    assert "critical_batch_size/noise_scale" in with_it.record.keys


# What it says


def lines_of(tmp_path, caplog, monitor, module=None, loader=None, **settings):
    caplog.clear()
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        run = trainer(tmp_path, callbacks=[monitor], max_epochs=1, **settings)
        run.fit(module or Regression(sgd), batches() if loader is None else loader)
    return [text for text in caplog.messages if text.startswith("CriticalBatchSizeMonitor")]


def test_lines_and_figure(tmp_path, caplog):
    first, last = lines_of(tmp_path, caplog, watch(save_figure=True, every_n_steps=7))
    assert "noise scale from 16 gradients of extra batches, 49 numbers of a sketch" in first
    assert "over steps 0 to 7" in last
    assert "of a step" in last
    assert (tmp_path / "critical_batch_size.png").stat().st_size > 10_000
    assert (tmp_path / "critical_batch_size.svg").exists()


def test_the_batch_of_a_step_counts_accumulated_batches(tmp_path, caplog):
    monitor = watch(source="microbatches")
    first, last = lines_of(tmp_path, caplog, monitor, accumulate_grad_batches=3)
    assert "gradients of the 3 micro-batches of a step" in first
    assert monitor.batch_of_step == 24
    assert " the 24 of a step" in last


def test_what_stands_in_the_way_is_said(tmp_path, caplog):
    first, last = lines_of(tmp_path, caplog, watch(), TwoOptimizers(sgd))
    assert "nothing can be measured, because in manual optimization only `loss_fn` can" in first
    assert last == "CriticalBatchSizeMonitor: no gradient noise was measured."
    own = watch(loss_fn=lambda module, batch: loss_of(module.net, batch))
    _, last = lines_of(tmp_path, caplog, own, TwoOptimizers(sgd))
    assert "noise scale" in last


def test_without_a_known_batch_size_nothing_is_compared(tmp_path, caplog):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter([[part[None] for part in sample] for sample in batches().dataset] * 2)

    loader = DataLoader(Stream(), batch_size=None)
    monitor = watch(source="microbatches")
    _, last = lines_of(tmp_path, caplog, monitor, None, loader, accumulate_grad_batches=8)
    assert monitor.batch_of_step is None
    assert "noise scale" in last
    assert "of a step" not in last


PAYS = " of a step: a larger batch pays."
NOT = " of a step: a larger batch would not pay."
GOOD = " of a step, which is a good compromise: twice the batch would take"
IN, S, T = (
    " samples in a step would take",
    " times the steps and",
    " times the samples, at a learning rate up to",
)
N = " times today's."


@pytest.mark.parametrize(
    ("scale", "batch_size", "expected"),
    [
        # (1 + 512/512)/(1 + 512/32) = 2/17 of the steps, and 16 times that of the samples.
        (NoiseScale(512.0, 400.0, 700.0), 32, f"above the 32{PAYS} 512{IN} 0.12{S} 1.9{T} 8.5{N}"),
        # (1 + 64/64)/(1 + 64/1024) = 32/17.
        (NoiseScale(64.0, 50.0, 80.0), 1024, f"below the 1024{NOT} 64{IN} 1.9{S} 0.12{T} 0.53{N}"),
        (NoiseScale(100.0, 50.0, 150.0), 100, f"about the 100{GOOD} 0.75{S} 1.5{T} 1.3{N}"),
        (NoiseScale(36.0, 33.0, 40.0), 32, f"above the 32{PAYS} 64{IN} "),
        (NoiseScale(95.0, 90.0, 98.0), 100, f"below the 100{NOT} 50{IN} "),
        (NoiseScale(math.inf, 900.0, math.inf), 32, f"above the 32{PAYS} 1024{IN} "),
        (NoiseScale(0.0, 0.0, 0.0), 8, f"below the 8{NOT} 1{IN} "),
    ],
)
def test_advice(scale, batch_size, expected):
    assert recommend_batch_size(scale, batch_size).startswith(f", {expected}")


def test_advice_without_ground():
    assert (
        recommend_batch_size(NoiseScale(9.0, 5.0, 15.0), None)
        == ". Batches up to about that size pay."
    )
    assert (
        recommend_batch_size(NoiseScale(math.nan, 0.0, math.inf), 8)
        == ". Nothing follows from that."
    )


def test_a_noise_scale_in_words():
    scale = NoiseScale(123.4, 100.0, 200.0)
    assert (
        describe_noise_scale(scale, [7])
        == "noise scale 123 samples (between 100 and 200) at step 7"
    )
    assert describe_noise_scale(NoiseScale(math.inf, 90.0, math.inf), [0, 9]) == (
        "noise scale over steps 0 to 9, above 90 for certain"
    )


def test_figures_can_be_drawn_of_anything():
    monitor = watch()
    assert len(monitor.plot().axes) == 2
    monitor.batch_of_step = 32
    monitor.history.add(0, {"noise_scale": math.inf, "low": 0.0, "high": math.inf})
    monitor.history.add(1, {"noise_scale": 50.0, "low": 40.0, "high": 60.0})
    left, right = monitor.plot().axes
    assert right.lines[2].get_xdata()[0] == 50.0
    assert left.get_ylim()[1] < 10_000


@pytest.mark.parametrize(
    ("settings", "argument"),
    [
        ({"num_batches": 1}, "num_batches"),
        ({"window": 0}, "window"),
        ({"num_coordinates": 0}, "num_coordinates"),
        ({"source": "steps"}, "source"),
        ({"every_n_steps": 5, "every_n_epochs": 1}, "every_n_epochs"),
    ],
)
def test_impossible_settings_are_refused(settings, argument):
    with pytest.raises(ValueError, match=f"Expected `{argument}` to be"):
        CriticalBatchSizeMonitor(**settings)


def test_it_looks_every_100_steps_by_default():
    assert CriticalBatchSizeMonitor().schedule.every == 100
    assert CriticalBatchSizeMonitor().schedule.max_overhead == 0.02
    assert CriticalBatchSizeMonitor(every_n_epochs=2).unit == "epoch"
