"""TailIndexMonitor and its gradients against gradients by hand, NumPy, and noise of a known law."""

from __future__ import annotations

import logging
from functools import partial

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from support.processes import run_ranks
from support.training import Regression, TwoOptimizers, batches, loss_of, trainer
from torch.nn.utils import parameters_to_vector
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from torchmetrics import MeanMetric

from lightning_sgd import TailIndexMonitor, sample_stable
from lightning_sgd.callbacks._monitoring.gradient_collector import GradientCollector
from lightning_sgd.callbacks._monitoring.module_state import module_state_kept
from lightning_sgd.callbacks._monitoring.step_gradients import gather_interleaved
from lightning_sgd.functional.noise.gradient_sample import Coordinates, GradientSample
from lightning_sgd.functional.noise.gradient_tail_index import gradient_tail_index

SGD = partial(torch.optim.SGD, lr=0.1)


def watch(**settings):
    defaults = {"every_n_steps": 7, "max_overhead": None, "save_figure": False}
    return TailIndexMonitor(**{**defaults, **settings})


class Noise(LightningModule):
    """The gradient of the weights is the mean of the samples of a batch, whatever the weights."""

    def __init__(self, size):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(size))

    def training_step(self, batch):
        return (self.weight * batch[0]).sum(dim=1).mean()

    def configure_optimizers(self):
        return SGD(self.parameters())


def noise_of(alpha, size=200, num=4000):
    """Samples of a stable law, every coordinate with a scale of its own."""
    generator = torch.Generator().manual_seed(0)
    x = sample_stable(alpha, (num, size), generator=generator, dtype=torch.float32)
    return DataLoader(TensorDataset(x * torch.logspace(-3, 3, size)), batch_size=1)


class Samples(Callback):
    """Keeps what the collector of the callback before it gathers after the last step, and the weights then."""

    def on_train_end(self, trainer, pl_module):
        self.sample = trainer.callbacks[0].collector.sample(trainer, pl_module)


# The measurement


@pytest.mark.parametrize(("alpha", "tolerance"), [(1.3, 0.15), (2.0, 0.2)])
def test_noise_of_a_known_law_is_recognised(tmp_path, alpha, tolerance):
    # The pooled number of the paper cannot tell the two laws apart, because the scales differ.
    monitor = watch(num_batches=256)
    run = trainer(tmp_path, callbacks=[monitor], max_steps=1, max_epochs=-1)
    run.fit(Noise(200), noise_of(alpha))
    metrics = {key: value.item() for key, value in run.callback_metrics.items()}
    assert metrics["tail_index/coordinate"] == pytest.approx(alpha, abs=tolerance)
    assert metrics["tail_index/coordinate_error"] < tolerance
    assert metrics["tail_index/pooled_shuffled"] < 1.3
    assert metrics["tail_index/zero_fraction"] == 0
    assert monitor.verdict == ("stable" if alpha < 2 else "finite variance")


def test_gradients_are_those_of_the_batches(tmp_path):
    # With one batch as large as the data and as many rows, each gradient can be checked by hand.
    module, keep = Regression(SGD), Samples()
    monitor = watch(num_batches=5, batch_size=3, num_coordinates=None)
    trainer(tmp_path, callbacks=[monitor, keep], max_epochs=1).fit(module, batches())
    sample, drawn = keep.sample, []

    def note(module, batch):
        drawn.append([part.clone() for part in batch])
        return loss_of(module.net, batch)

    other, again = watch(num_batches=5, batch_size=3, num_coordinates=None, loss_fn=note), Samples()
    trainer(tmp_path, callbacks=[other, again], max_epochs=1).fit(Regression(SGD), batches())
    assert torch.equal(again.sample.rows, sample.rows)
    assert sample.rows.shape == (5, 49)
    params = list(module.parameters())
    for batch, row in zip(drawn[-5:], sample.rows, strict=True):
        by_hand = torch.autograd.grad(loss_of(module.net, batch), params)
        expected = torch.cat([gradient.flatten() for gradient in by_hand])
        torch.testing.assert_close(row, expected)
    columns = sample.layers["net.2.weight"]
    assert columns.stop - columns.start == 8


def test_noise_and_differences_have_the_variance_of_the_gradients():
    rows = torch.randn(2000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sample = GradientSample(2 * rows + 5, 1, {}, 0)
    np.testing.assert_allclose(sample.noise.var(dim=0, correction=0), sample.rows.var(dim=0))
    assert sample.differences.shape == (1000, 3)
    np.testing.assert_allclose(sample.differences.var(dim=0), [4, 4, 4], rtol=0.15)
    broken = GradientSample(torch.tensor([[1.0], [torch.inf], [2.0]]), 1, {}, 0).finite()
    assert broken.rows.tolist() == [[1.0], [2.0]]
    few = gradient_tail_index(GradientSample(torch.ones(1, 3), 1, {}, 0), torch.Generator())
    assert np.isnan([few.coordinate.alpha, few.pooled.alpha, few.pooled_shuffled]).all()


@pytest.mark.parametrize("num", [1, 7, 100, None])
def test_coordinates_are_spread_over_all_parameters(num):
    sizes = {"a": 90, "b": 9, "c": 1}
    tensors = [torch.arange(90.0).view(9, 10), 100 + torch.arange(9.0), torch.tensor([200.0])]
    coordinates = Coordinates(sizes, num, seed=0)
    values = coordinates.of(tensors)
    assert len(values) == coordinates.num_coordinates == len(values.unique())
    assert abs(len(values) - min(num or 100, 100)) <= 2
    parts = [values[part] for part in coordinates.layers.values()]
    assert [len(part) > 0 for part in parts] == [True] * 3
    assert (parts[1] >= 100).all()
    assert parts[2].tolist() == [200.0]
    assert torch.equal(values, Coordinates(sizes, num, seed=0).of(tensors))


class First(Callback):
    """Keeps the sample of the first look."""

    def on_train_start(self, trainer, pl_module):
        self.sample = trainer.callbacks[0].collector.sample(trainer, pl_module)


def test_a_grad_scaler_is_left_alone_and_leaves_no_scale(tmp_path):
    samples, scales = [], []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=10**6)):
        plugins = [MixedPrecision("16-mixed", "cpu", scaler)] if scaler else None
        keep = First()
        run = trainer(tmp_path, callbacks=[watch(), keep], plugins=plugins, max_epochs=1)
        run.fit(Regression(SGD), batches())
        samples.append(keep.sample.rows)
        scales.append(scaler and scaler.get_scale())
    assert scales == [None, 2.0**10]
    torch.testing.assert_close(samples[1], samples[0], rtol=0.05, atol=0.01)


# Sharing and ranks


def test_monitors_that_ask_for_the_same_pay_once(tmp_path):
    calls = []

    def counted(module, batch):
        calls.append(None)
        return loss_of(module.net, batch)

    def run(*monitors):
        calls.clear()
        trainer(tmp_path, callbacks=list(monitors), max_epochs=1).fit(Regression(SGD), batches())
        return len(calls)

    settings = {"num_batches": 8, "loss_fn": counted}
    assert run(watch(**settings)) == 2 * 8
    pair = watch(**settings), watch(**settings, log_layers=True, every_n_steps=14)
    assert run(*pair) == 2 * 8
    assert pair[0].values == pair[1].values
    assert run(watch(**settings), watch(**settings, seed=1)) == 4 * 8


def test_rows_of_all_ranks_are_in_the_order_of_their_batches(tmp_path):
    found = run_ranks(
        lambda rank: gather_interleaved(torch.arange(3.0)[:, None] * 2 + rank, 2), 2, tmp_path
    )
    assert [rows.flatten().tolist() for rows in found] == [[0, 1, 2, 3, 4, 5]] * 2


# Leaving no trace


class Careless(LightningModule):
    """Changes everything that a training step may change."""

    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(
            torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4), torch.nn.Dropout()
        )
        self.metric, self.count, self.seen = MeanMetric(), 0, [torch.zeros(1)]
        self.cache, self.last = {"sum": torch.zeros(1)}, None

    def training_step(self, batch):
        loss = self.net(batch[0]).square().mean()
        self.count += 1
        self.metric.update(loss.detach())
        self.seen.append(loss.detach())
        self.seen[0] += 1
        self.cache["sum"] += 1
        self.cache[self.count] = 1
        self.last = batch
        self.log("loss", loss)
        return loss

    def state(self):
        tensors = [
            *self.net.buffers(),
            self.seen[0],
            self.cache["sum"],
            *self.metric.metric_state.values(),
        ]
        numbers = [
            self.count,
            len(self.seen),
            list(self.cache),
            self.last,
            self.metric.update_count,
        ]
        return [tensor.clone() for tensor in tensors], [*numbers, self.net.training]

    def configure_optimizers(self):
        return SGD(self.parameters())


@pytest.mark.parametrize("fails", [False, True])
def test_whatever_a_training_step_changes_is_put_back(fails):
    module = Careless()
    module.log = lambda *_: None
    module.training_step([torch.randn(5, 4)])
    module.last = None
    tensors, numbers = module.state()
    buffers = [id(buffer) for buffer in module.buffers()]
    with pytest.raises(RuntimeError) if fails else torch.enable_grad(), module_state_kept(module):
        module.eval()
        module.train()
        module.training_step([torch.randn(5, 4)])
        if fails:
            raise RuntimeError
    after, same = module.state()
    assert same == numbers
    assert all(torch.equal(a, b) for a, b in zip(after, tensors, strict=True))
    assert [id(buffer) for buffer in module.buffers()] == buffers


def test_nothing_is_logged_by_the_passes_of_the_monitor(tmp_path):
    logger = CSVLogger(tmp_path, name="", version="")
    data = DataLoader(TensorDataset(torch.randn(40, 4)), batch_size=8)
    module = Careless()
    run = trainer(tmp_path, callbacks=[watch(num_batches=4)], logger=logger, log_every_n_steps=1)
    run.fit(module, data)
    rows = np.genfromtxt(tmp_path / "metrics.csv", delimiter=",", names=True)
    assert (~np.isnan(rows["loss"])).sum() == module.count == 10
    assert "log" not in vars(module)


# What stands in the way, and what is said


class Stream(IterableDataset):
    def __iter__(self):
        return iter(torch.randn(20, 4))


@pytest.mark.parametrize(
    ("module", "data", "reason"),
    [
        (lambda: TwoOptimizers(SGD), batches, "in manual optimization only `loss_fn` can say"),
        (Careless, lambda: DataLoader(Stream(), batch_size=4), "with a map-style data set only"),
        (Careless, lambda: [batches(), batches()], "from a single DataLoader"),
    ],
    ids=["manual optimization", "iterable data set", "two loaders"],
)
def test_what_stands_in_the_way_is_said(tmp_path, caplog, module, data, reason):
    class Plain(Careless):
        def training_step(self, batch):
            return self.net(torch.randn(4, 4)).mean()

    made = Plain() if module is Careless else module()
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        trainer(tmp_path, callbacks=[watch()], max_epochs=1).fit(made, data())
    lines = [text for text in caplog.messages if text.startswith("TailIndexMonitor")]
    assert (
        f"nothing can be measured, because {'' if 'only `loss' in reason else 'batches'}"
        in lines[0]
    )
    assert reason in lines[0]
    assert lines[1] == "TailIndexMonitor: no gradient noise was measured."


def test_a_function_of_ones_own_serves_manual_optimization(tmp_path):
    monitor = watch(loss_fn=lambda module, batch: loss_of(module.net, batch))
    trainer(tmp_path, callbacks=[monitor], max_epochs=1).fit(TwoOptimizers(SGD), batches())
    assert np.isfinite(monitor.values["coordinate"]).all()


def test_a_training_step_that_returns_something_else_is_told(tmp_path):
    class Text(Regression):
        def training_step(self, batch, batch_idx):
            return "loss"

    with pytest.raises(TypeError, match="Expected `training_step` to return a loss, got str"):
        trainer(tmp_path, callbacks=[watch()]).fit(Text(SGD), batches())


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_steps_without_loss_are_left_out(tmp_path, caplog):
    class Skips(Regression):
        share = 0.0

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss if (batch[0][:, 0] > 0).float().mean() < self.share else None

    def run(share):
        monitor, kept = watch(num_batches=32, batch_size=3, num_coordinates=None), Samples()
        module = Skips(SGD)
        module.share = share
        trainer(tmp_path, callbacks=[monitor, kept], max_steps=2).fit(module, batches())
        return kept.sample, monitor

    whole, _ = run(share=2.0)
    some, _ = run(share=0.6)
    assert len(whole.rows) == 32
    assert 2 <= len(some.rows) < 32
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        nothing, monitor = run(share=-1.0)
    assert nothing is None
    assert not monitor.times
    reason = "nothing could be measured, because the steps return no loss."
    assert caplog.messages[-1].endswith(f"no gradient noise was measured. At step 2 {reason}")


def test_gradients_that_are_not_finite_at_the_end_are_told(tmp_path, caplog):
    class Diverges(Regression):
        def training_step(self, batch, batch_idx):
            factor = float("nan") if self.global_step >= 4 else 1.0
            return factor * super().training_step(batch, batch_idx)

    monitor = watch(every_n_steps=2, num_batches=8, max_overhead=None, save_figure=True)
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        run = trainer(tmp_path, callbacks=[monitor], max_steps=6, max_epochs=-1)
        run.fit(Diverges(SGD), batches())
    assert run.state.finished
    assert monitor.times == [0, 2]
    assert "At step 6 nothing could be measured, because its gradients are not" in caplog.text
    assert (tmp_path / "tail_index.png").exists()


@pytest.mark.parametrize("source", ["extra", "microbatches"])
@pytest.mark.filterwarnings("ignore:.*use_reentrant")
def test_checkpoints_of_either_kind_give_the_same_gradients(tmp_path, source):
    class Saves(Regression):
        reentrant = False

        def training_step(self, batch, batch_idx):
            x = batch[0].clone().requires_grad_()
            hidden = checkpoint(self.net[0], x, use_reentrant=self.reentrant)
            return (self.net[1:](hidden).squeeze(-1) - batch[1].squeeze(-1)).square().mean()

    def run(reentrant):
        torch.manual_seed(0)
        monitor, kept = watch(num_batches=4, num_coordinates=None, source=source), Samples()
        if source == "microbatches":
            monitor = watch(every_n_steps=1, num_coordinates=None, source=source)
        module = Saves(SGD)
        module.reentrant = reentrant
        settings = {"accumulate_grad_batches": 2} if source == "microbatches" else {}
        run = trainer(tmp_path, callbacks=[monitor, kept], max_steps=2, **settings)
        run.fit(module, batches())
        return kept.sample.rows, parameters_to_vector(module.parameters())

    (rows, weights), (expected, same_weights) = run(True), run(False)
    assert (expected[:, 0] != 0).any()
    torch.testing.assert_close(rows, expected)
    torch.testing.assert_close(weights, same_weights)


@pytest.mark.slow
def test_lines_and_figure(tmp_path, caplog):
    monitor = watch(num_batches=64, save_figure=True)
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        trainer(tmp_path, callbacks=[monitor], max_epochs=1).fit(Regression(SGD), batches())
    first, last = (text for text in caplog.messages if text.startswith("TailIndexMonitor"))
    assert "64 gradients of extra batches, 49 coordinates, 0.0125 MB, every 7 steps" in first
    alpha = monitor.values["coordinate"][-1]
    assert f"by coordinate α = {alpha:.2f} ± " in last
    assert f" at step 7, {monitor.verdict}; pooled as in the paper " in last
    assert (tmp_path / "tail_index.png").stat().st_size > 10_000
    assert len(monitor.plot().axes) == 2
    assert monitor.times == [0, 7]


def test_it_looks_every_500_steps_by_default():
    assert TailIndexMonitor().schedule.every == 500
    assert TailIndexMonitor().schedule.max_overhead == 0.02
    assert TailIndexMonitor(every_n_epochs=2).unit == "epoch"


@pytest.mark.parametrize(
    ("settings", "argument"),
    [
        ({"num_batches": 1}, "num_batches"),
        ({"num_coordinates": 0}, "num_coordinates"),
        ({"batch_size": 0}, "batch_size"),
        ({"max_overhead": 0.0}, "max_overhead"),
        ({"every_n_steps": 5, "every_n_epochs": 1}, "every_n_epochs"),
    ],
)
def test_impossible_settings_are_refused(settings, argument):
    with pytest.raises(ValueError, match=f"Expected `{argument}` to be"):
        TailIndexMonitor(**settings)


def test_settings_tell_collectors_apart():
    assert GradientCollector(4, None).settings == GradientCollector(4, None).settings
    assert GradientCollector(4, None).settings != GradientCollector(4, None, seed=1).settings
