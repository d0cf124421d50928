"""RankMonitor against NumPy's singular values of the same weights."""

from __future__ import annotations

import logging
from datetime import timedelta
from functools import partial

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy
from support.training import Regression, batches, trainer

from lightning_sgd import MaSS, RankMonitor
from lightning_sgd.callbacks._monitoring.monitor import Monitor
from lightning_sgd.callbacks.rank_monitor.heat_map import MAX_LABELS, draw_heat_map
from lightning_sgd.functional.spectra import (
    gram,
    norms,
    rank_measures,
    singular_values,
    spectral_stats,
)
from lightning_sgd.functional.spectra.spectral_stats import SpectralMeasures

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.5, weight_decay=0.05)


class Wide(Regression):
    """Has three weight matrices that are worth watching."""

    def __init__(self, make=SGD):
        super().__init__(make)
        torch.manual_seed(0)
        layers = [torch.nn.Linear(4, 12), torch.nn.Tanh(), torch.nn.Linear(12, 10)]
        self.net = torch.nn.Sequential(*layers, torch.nn.Tanh(), torch.nn.Linear(10, 1))


def watch(**settings):
    return RankMonitor(**{"min_side": 4, "save_figure": False, "max_overhead": None, **settings})


def by_numpy(weight, tol=0.01):
    sigma = np.linalg.svd(weight.detach().double().numpy(), compute_uv=False)
    shares = sigma / sigma.sum()
    return {
        f"rank/rank_{tol}": float((sigma / np.linalg.norm(sigma) > tol).sum()),
        "rank/stable_rank": (sigma**2).sum() / sigma[0] ** 2,
        "rank/effective_rank": np.exp(-(shares * np.log(shares)).sum()),
    }


class Weights(Callback):
    """Copies of the two watched weights after every step."""

    def __init__(self):
        self.copies = {}

    def on_train_start(self, trainer, pl_module):
        self.on_train_batch_end(trainer, pl_module)

    def on_train_batch_end(self, trainer, pl_module, *args):
        net = pl_module.net
        self.copies[trainer.global_step] = [net[i].weight.detach().clone() for i in (0, 2)]


def test_values_are_those_of_the_weights_at_that_step(tmp_path):
    logger = CSVLogger(tmp_path, name="", version="")
    weights = Weights()
    monitor = watch(every_n_steps=3, tol=[0.01], log_layers=True)
    module = Wide()
    trainer(tmp_path, logger=logger, callbacks=[monitor, weights], log_every_n_steps=1).fit(
        module, batches()
    )
    assert monitor.history.times == [0, 3, 6, 9, 12, 14]
    rows = np.genfromtxt(tmp_path / "metrics.csv", delimiter=",", names=True, deletechars="")
    assert [matrix.name for matrix in monitor.matrices] == ["net.0.weight", "net.2.weight"]
    for index, time in enumerate(monitor.history.times):
        expected = [by_numpy(weight) for weight in weights.copies[time]]
        for key in expected[0]:
            values = [values[key] for values in expected]
            mean = rows[key][~np.isnan(rows[key])][index]
            assert mean == pytest.approx(np.mean(values), rel=1e-5)
            for matrix, value in zip(monitor.matrices, values, strict=True):
                column = rows[f"{key}/{matrix.name}"]
                assert column[~np.isnan(column)][index] == pytest.approx(value, rel=1e-5)


def test_by_default_it_looks_at_the_start_and_after_every_epoch(tmp_path):
    monitor = watch()
    run = trainer(tmp_path, callbacks=[monitor], max_epochs=3)
    run.fit(Wide(), batches())
    assert monitor.history.times == [0, 7, 14, 21]
    expected = by_numpy(run.lightning_module.net[0].weight)["rank/effective_rank"]
    assert monitor.history.tables[-1][
        monitor.spectra.keys.index("effective_rank"), 0
    ] == pytest.approx(expected, rel=1e-5)


def test_values_can_be_monitored_by_other_callbacks(tmp_path):
    run = trainer(tmp_path, callbacks=[watch(every_n_steps=1)])
    run.fit(Wide(), batches())
    assert {"rank/stable_rank", "rank/effective_rank", "rank/num_dead"} <= set(run.callback_metrics)


class SlowClock(Callback):
    """A clock on which a batch takes one second, a full look half a second, and a cheap one an eighth."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(
            "lightning_sgd.callbacks._monitoring.monitor.time.perf_counter", lambda: self.now
        )
        for name, seconds in (("look", 1 / 2), ("cheap_look", 1 / 8)):
            monkeypatch.setattr(RankMonitor, name, self.slow(getattr(RankMonitor, name), seconds))

    def slow(self, function, seconds):
        def call(*args):
            self.now += seconds
            return function(*args)

        return call

    def on_train_batch_start(self, *args):
        self.now += 1.0


def test_cheap_looks_go_on_between_full_looks(tmp_path, monkeypatch, caplog):
    logger = CSVLogger(tmp_path, name="", version="")
    clock, weights = SlowClock(monkeypatch), Weights()
    monitor = watch(every_n_steps=1, max_overhead=1 / 8 / 0.8, tol=[0.01], log_bound=True)
    run = trainer(
        tmp_path,
        logger=logger,
        callbacks=[clock, monitor, weights],
        max_steps=25,
        max_epochs=-1,
        log_every_n_steps=1,
    )
    with caplog.at_level(logging.INFO):
        run.fit(Wide(), batches())
    # By hand in the test of the schedule.
    full = [0, 14, 24]
    assert monitor.history.times == [0, 4, 6, 7, 8, 10, 12, 14, 15, 16, 18, 20, 22, 24, 25]
    rows = np.genfromtxt(tmp_path / "metrics.csv", delimiter=",", names=True, deletechars="")
    for key, times in (
        ("rank/stable_rank", monitor.history.times),
        ("rank/num_dead", monitor.history.times),
        ("rank/bound_vacuous_0.1", monitor.history.times),
        ("rank/effective_rank", full),
        ("rank/rank_0.01", full),
    ):
        there = ~np.isnan(rows[key])
        # Beside the loss of the step before; the first look stands at 0, too.
        assert rows["step"][there].tolist() == [max(0, time - 1) for time in times]
        if key in by_numpy(weights.copies[0][0]):
            expected = [np.mean([by_numpy(w)[key] for w in weights.copies[t]]) for t in times]
            np.testing.assert_allclose(rows[key][there], expected, rtol=1e-3)
    assert (rows["rank/num_dead"][~np.isnan(rows["rank/num_dead"])] == 0).all()
    assert "in full at most every 10 looks, else only stable_rank, with a bound" in caplog.text
    assert "effective rank of 2 matrices went from" in caplog.text
    assert "in 24 steps" in caplog.text
    assert ", as of step 24 of 25: `max_overhead` allowed no full look since." in caplog.text


@pytest.mark.slow
def test_where_only_the_first_look_is_full_the_end_is_about_the_stable_rank(
    tmp_path, monkeypatch, caplog
):
    monitor = watch(every_n_steps=1, max_overhead=1 / 8 / 0.8, save_figure=True)
    run = trainer(tmp_path, callbacks=[SlowClock(monkeypatch), monitor], max_steps=7, max_epochs=-1)
    with caplog.at_level(logging.INFO):
        run.fit(Wide(), batches())
    assert monitor.history.full == [True, False, False, False]
    assert "stable rank of 2 matrices went from" in caplog.text
    assert "as of" not in caplog.text
    assert (tmp_path / "rank_heat_map.png").exists()


@pytest.mark.slow
def test_a_training_too_short_for_a_second_look_says_so(tmp_path, monkeypatch, caplog):
    monitor = watch(max_overhead=1 / 8 / 0.8, save_figure=True)
    run = trainer(tmp_path, callbacks=[SlowClock(monkeypatch), monitor], max_steps=3, max_epochs=-1)
    with caplog.at_level(logging.INFO):
        run.fit(Wide(), batches())
    assert monitor.history.times == [0]
    assert "which pays for the next look after 4 s" in caplog.text
    expected = (
        "effective rank was measured once, as of step 0 of 3: `max_overhead` allowed no full look"
    )
    assert f"RankMonitor: {expected} since." in caplog.text


def test_measures_that_are_all_cheap_leave_no_cheap_look():
    assert not watch(measures=["stable_rank", "spectral_norm"]).schedule.has_cheap_look
    assert watch(measures=["stable_rank", "participation_ratio"]).schedule.has_cheap_look


def test_full_looks_cannot_be_every_zero():
    with pytest.raises(ValueError, match="Expected `full_every_n_looks` to be at least 1, got 0"):
        RankMonitor(full_every_n_looks=0)


def test_a_matrix_that_shrinks_to_nothing_is_named_dead_and_left_out(tmp_path, caplog):
    class Kill(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            if trainer.global_step == 5:
                pl_module.net[0].weight.data.mul_(1e-12)
                pl_module.net[0].weight.requires_grad_(False)

    monitor = watch(every_n_steps=1, tol=[0.01])
    run = trainer(tmp_path, callbacks=[Kill(), monitor])
    with caplog.at_level(logging.INFO):
        run.fit(Wide(), batches())
    assert run.callback_metrics["rank/num_dead"] == 1
    alone = by_numpy(run.lightning_module.net[2].weight)["rank/effective_rank"]
    assert run.callback_metrics["rank/effective_rank"].item() == pytest.approx(alone, rel=1e-5)
    assert "dead: net.0.weight" in caplog.text


def test_two_ranks_share_the_work_and_agree(tmp_path):
    class Save(Callback):
        def on_train_end(self, trainer, pl_module):
            table = trainer.callbacks[0].history.tables[-1]
            torch.save(table, tmp_path / f"{trainer.world_size}-{trainer.global_rank}.pt")

    for devices in (1, 2):
        ddp = DDPStrategy(start_method="fork", timeout=timedelta(seconds=30))
        trainer(
            tmp_path,
            devices=devices,
            strategy=ddp if devices == 2 else "auto",
            callbacks=[watch(include=["net.*"]), Save()],
            max_epochs=1,
            limit_train_batches=0 if devices == 0 else 1,
        ).fit(Wide(partial(torch.optim.SGD, lr=0.0)), batches())
    alone, first, second = (torch.load(tmp_path / f"{n}.pt") for n in ("1-0", "2-0", "2-1"))
    assert torch.equal(first, second)
    torch.testing.assert_close(first, alone)


@pytest.mark.parametrize(
    "make",
    [
        partial(torch.optim.SGD, lr=0.1, weight_decay=3.0),
        partial(MaSS, lr=0.02, weight_decay=10.0, decoupled_weight_decay=True, alpha=0.5),
    ],
    ids=["SGD", "MaSS"],
)
def test_the_bound_holds_for_the_real_schedule(tmp_path, make):
    class Loud(Wide):
        def training_step(self, batch, batch_idx):
            return 30 * super().training_step(batch, batch_idx)

        def configure_optimizers(self):
            optimizer = make(self.parameters())
            schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.98)
            return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    class Compare(Callback):
        def __init__(self):
            self.bounds = []

        def on_train_batch_end(self, trainer, pl_module, *args):
            monitor = trainer.callbacks[0]
            norms = monitor.history.tables[-1][
                monitor.spectra.keys.index("frobenius_norm")
            ].tolist()
            for index, weight in enumerate((pl_module.net[0].weight, pl_module.net[2].weight)):
                pairs = monitor.bound.tails[index]
                sigma = np.linalg.svd(weight.detach().numpy(), compute_uv=False)
                relative = np.append(sigma / norms[index], 0.0)
                for k, tail in pairs:
                    assert relative[min(k, len(sigma))] <= tail + 1e-6
                    self.bounds.append(k)

    one_by_one = torch.utils.data.DataLoader(batches().dataset, batch_size=1)
    compare = Compare()
    monitor = watch(every_n_steps=1, log_bound=True, bound_eps=[0.6])
    run = trainer(tmp_path, callbacks=[monitor, compare], limit_train_batches=12, max_epochs=1)
    run.fit(Loud(), one_by_one)
    assert set(compare.bounds) == set(range(1, 13))
    assert run.callback_metrics["rank/bound_vacuous_0.6"] <= 1


def test_the_bound_is_logged_relative_to_the_short_side(tmp_path):
    # With lr·decay = 1 a single step forgets everything: the weights are one outer product.
    make = partial(torch.optim.SGD, lr=0.5, weight_decay=2.0)
    one_by_one = torch.utils.data.DataLoader(batches().dataset, batch_size=1)
    monitor = watch(every_n_steps=1, log_bound=True, bound_eps=[0.1], min_side=10)
    run = trainer(tmp_path, callbacks=[monitor], limit_train_batches=3, max_epochs=1)
    run.fit(Wide(make), one_by_one)
    assert run.callback_metrics["rank/bound_vacuous_0.1"] == 0
    assert run.callback_metrics["rank/bound_0.1"] == pytest.approx(1 / 10)
    assert np.linalg.matrix_rank(run.lightning_module.net[2].weight.detach().numpy()) == 1


@pytest.mark.parametrize("reason", ["Adam", "GradScaler"])
def test_the_bound_is_not_claimed_where_it_does_not_hold(tmp_path, caplog, reason):
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    plugins = [MixedPrecision("16-mixed", "cpu", scaler)] if reason == "GradScaler" else None
    make = partial(torch.optim.Adam, lr=1e-3) if reason == "Adam" else SGD
    run = trainer(tmp_path, callbacks=[watch(log_bound=True)], plugins=plugins)
    with caplog.at_level(logging.INFO):
        run.fit(Wide(make), batches())
    assert "the bound is not applicable to this optimizer" in caplog.text
    assert run.callback_metrics["rank/bound_vacuous_0.1"] == 1
    assert "rank/bound_0.1" not in run.callback_metrics


@pytest.mark.parametrize("fails", [False, True])
def test_no_hook_is_left_behind(tmp_path, fails):
    class Fail(Callback):
        def on_train_batch_start(self, *args):
            raise RuntimeError("somebody else's fault")

    module = Wide()
    callbacks = [watch(log_bound=True), *([Fail()] if fails else [])]
    run = trainer(tmp_path, callbacks=callbacks)
    if fails:
        with pytest.raises(RuntimeError, match="somebody else's fault"):
            run.fit(module, batches())
    else:
        run.fit(module, batches())
    assert not any(child._forward_hooks for child in module.modules())


@pytest.mark.slow
def test_the_heat_map_goes_to_the_folder_and_to_tensorboard(tmp_path, caplog):
    logger = TensorBoardLogger(tmp_path, name="", version="")
    monitor = watch(save_figure=True)
    with caplog.at_level(logging.INFO):
        trainer(tmp_path, logger=logger, callbacks=[monitor], log_every_n_steps=1).fit(
            Wide(), batches()
        )
    png = (tmp_path / "rank_heat_map.png").read_bytes()
    assert png.startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "rank_heat_map.svg").read_text()
    assert f"Heat map: {tmp_path / 'rank_heat_map.png'}" in caplog.text
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path)).Reload()
    assert events.Tags()["images"] == ["rank/heat_map"]
    assert {"rank/rank_0.001", "rank/stable_rank"} <= set(events.Tags()["scalars"])


@pytest.mark.parametrize(
    ("num", "labels"), [(1, 1), (MAX_LABELS, MAX_LABELS), (MAX_LABELS + 1, 31), (3000, MAX_LABELS)]
)
def test_a_heat_map_of_many_matrices_names_some_of_them(num, labels):
    # matplotlib lays out every label: of 3000 matrices that took a minute, and the picture was 840 inches high.
    names = [f"layer {index}" for index in range(num)]
    axes = draw_heat_map("rank", names, [0, 5], torch.rand(2, num)).axes[0]
    places = [round(place) for place in axes.get_yticks()]
    assert [label.get_text() for label in axes.get_yticklabels()] == [names[at] for at in places]
    assert len(places) == labels
    assert axes.figure.get_figheight() <= 40


def test_a_module_without_matrices_is_refused(tmp_path):
    with pytest.raises(ValueError, match="leave RankMonitor at least one matrix, got 64"):
        trainer(tmp_path, callbacks=[watch(min_side=64)]).fit(Wide(), batches())


def test_two_intervals_are_refused():
    with pytest.raises(ValueError, match="Expected `every_n_epochs` to be left out beside"):
        RankMonitor(every_n_steps=1, every_n_epochs=1)


def test_every_monitor_is_a_monitor():
    assert issubclass(RankMonitor, Monitor)


def test_windows_hold_the_steps_and_norms_between_looks(tmp_path):
    # Three steps per window, momentum 0.5, decay 0.05, a learning rate that changes at every step.
    class Scheduled(Wide):
        def configure_optimizers(self):
            optimizer = SGD(self.parameters())
            schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
            return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    class Buffers(Callback):
        def __init__(self):
            self.norms = {}

        def on_train_batch_end(self, trainer, pl_module, *args):
            state = trainer.optimizers[0].state[pl_module.net[0].weight]
            self.norms[trainer.global_step] = state["momentum_buffer"].norm().item()

    monitor, buffers = watch(every_n_steps=3, log_bound=True), Buffers()
    run = trainer(tmp_path, callbacks=[buffers, monitor], max_epochs=1, limit_train_batches=6)
    run.fit(Scheduled(), batches())
    windows = monitor.bound.windows[0]
    assert monitor.history.times == [0, 3, 6]
    assert [window.num_samples for window in windows] == [24, 24]
    assert windows[0].buffer_norm == 0.0
    assert windows[1].buffer_norm == pytest.approx(buffers.norms[3], rel=1e-5)
    for first, window in zip((0, 3), windows, strict=True):
        product = np.eye(2)
        for t in range(first, first + 3):
            lr = 0.1 * 0.9**t
            # V ← ½V + 0.05W, then W ← W − lr·V.
            step = np.array([[1 - lr * 0.05, -lr * 0.5], [0.05, 0.5]])
            product = step @ product
        np.testing.assert_allclose(np.array(window.transfer).reshape(2, 2), product, rtol=1e-12)


@pytest.mark.parametrize("method", ["gram", "svd", "cheap"])
def test_a_look_at_good_matrices_builds_no_error_sentences(monkeypatch, method):
    measures = ["stable_rank", "participation_ratio"]
    if method != "cheap":
        measures += ["rank", "hard_rank", "energy_rank", "effective_rank"]
    matrices = [torch.randn(8, 12), torch.randn(9, 5)]
    of = SpectralMeasures(measures=measures, method="auto" if method == "gram" else method).of
    visits = []
    for module in (gram, norms, rank_measures, singular_values, spectral_stats):
        if hasattr(module, "expect"):
            monkeypatch.setattr(module, "expect", lambda *args: visits.append(args))
    of(matrices)
    assert visits == []
