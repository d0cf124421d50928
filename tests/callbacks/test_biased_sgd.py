"""GradientErrorMonitor against NumPy on the gradients that the steps were made with."""

from __future__ import annotations

import logging
from functools import partial

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from support.training import NUM_BATCHES, Regression, TwoOptimizers, batches, trainer

from lightning_sgd import BiasedSGDProblem, GradientErrorMonitor, biased_sgd_floor, fit_error_model

SGD = partial(torch.optim.SGD, lr=0.1)
PROBLEM = BiasedSGDProblem(m=0.1, L=1.0, G2=0.1)


class Steps(Callback):
    """The difference that every step made, over the step size: the gradient that it used."""

    def __init__(self):
        self.gradients = []

    def on_train_start(self, trainer, pl_module):
        self.before = [p.detach().double().clone() for p in pl_module.parameters()]

    def on_train_batch_end(self, trainer, pl_module, *args):
        now = [p.detach().double().clone() for p in pl_module.parameters()]
        moved = [(a - b) / 0.1 for a, b in zip(self.before, now, strict=True)]
        if any(bool(tensor.any()) for tensor in moved):
            self.gradients.append(moved)
        self.before = now


def watch(compressor="int8", **settings):
    settings = {"every_n_steps": 1, "max_overhead": None, **settings}
    return GradientErrorMonitor(compressor, **settings)


def rows(folder):
    table = np.genfromtxt(folder / "metrics.csv", delimiter=",", names=True, deletechars="")
    return {name: table[name][~np.isnan(table[name])] for name in table.dtype.names if "/" in name}


def by_numpy(gradient, levels):
    """Relative error and cosine of a uniform grid, tensor by tensor."""
    u, v = [], []
    for tensor in gradient:
        values = tensor.numpy().ravel()
        step = np.abs(values).max() / levels
        u.append(values)
        v.append(np.round(values / step) * step)
    u, v = np.concatenate(u), np.concatenate(v)
    return np.linalg.norm(v - u) / np.linalg.norm(u), u @ v / np.linalg.norm(u) / np.linalg.norm(v)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"accumulate_grad_batches": 3},
        {"gradient_clip_val": 0.05},
        {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
    ],
    ids=["plain", "accumulated", "clipped by norm", "clipped by value"],
)
def test_the_gradient_is_the_one_that_made_the_step(settings, tmp_path):
    steps, logger = Steps(), CSVLogger(tmp_path, name="", version="")
    trainer(
        tmp_path, callbacks=[watch("int4"), steps], logger=logger, log_every_n_steps=1, **settings
    ).fit(Regression(SGD), batches())
    logged = rows(tmp_path)
    expected = [by_numpy(gradient, levels=7) for gradient in steps.gradients]
    assert len(expected) >= 6
    relative, cosine = logged["gradient_error/relative"], logged["gradient_error/cosine"]
    np.testing.assert_allclose(relative, [r for r, _ in expected], rtol=2e-3)
    np.testing.assert_allclose(cosine, [c for _, c in expected], rtol=1e-4)


def test_a_model_covers_the_window(tmp_path):
    logger = CSVLogger(tmp_path, name="", version="")
    monitor = watch("int4", problem=PROBLEM, window=5)
    trainer(tmp_path, callbacks=[monitor], logger=logger, log_every_n_steps=1).fit(
        Regression(SGD), batches()
    )
    logged = rows(tmp_path)
    relative = logged["gradient_error/relative"]
    assert len(relative) == 2 * NUM_BATCHES
    assert len(monitor.grad_sq) == 5
    ratios = np.sqrt(np.array(monitor.err_sq) / np.array(monitor.grad_sq))
    np.testing.assert_allclose(ratios, relative[-5:], rtol=1e-6)
    delta, c = logged["gradient_error/delta"][-1], logged["gradient_error/c"][-1]
    assert (delta, c) == pytest.approx(
        fit_error_model(monitor.grad_sq, monitor.err_sq, PROBLEM), rel=1e-6
    )
    assert logged["gradient_error/floor"][-1] == pytest.approx(
        biased_sgd_floor(PROBLEM, delta, c), rel=1e-5
    )
    assert monitor.error_model() == pytest.approx((delta, c), rel=1e-6)


def test_without_a_problem_the_model_is_the_largest_relative_error(tmp_path):
    logger = CSVLogger(tmp_path, name="", version="")
    monitor = watch("sign")
    trainer(tmp_path, callbacks=[monitor], logger=logger, log_every_n_steps=1).fit(
        Regression(SGD), batches()
    )
    logged = rows(tmp_path)
    assert "gradient_error/floor" not in logged
    np.testing.assert_allclose(
        logged["gradient_error/delta"],
        np.maximum.accumulate(logged["gradient_error/relative"]),
        rtol=1e-6,
    )
    assert not logged["gradient_error/c"].any()


def test_a_function_of_ones_own(tmp_path):
    # Half of every gradient: relative error ½, the same direction.
    logger = CSVLogger(tmp_path, name="", version="")
    monitor = watch(half)
    trainer(tmp_path, callbacks=[monitor], logger=logger, log_every_n_steps=1).fit(
        Regression(SGD), batches()
    )
    logged = rows(tmp_path)
    np.testing.assert_allclose(logged["gradient_error/relative"], 0.5, rtol=1e-6)
    np.testing.assert_allclose(logged["gradient_error/cosine"], 1.0, rtol=1e-6)
    assert monitor.error_model() == pytest.approx((0.5, 0.0))


def half(gradient):
    return gradient / 2


def test_overflowed_gradients_are_left_out_and_counted(tmp_path):
    # A GradScaler that begins too high: those steps are skipped, and infinite gradients fit no model.
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**30))
    monitor = watch("bf16")
    trainer(tmp_path, plugins=[plugin], callbacks=[monitor]).fit(Regression(SGD), batches())
    assert 0 < monitor.num_overflows < 2 * NUM_BATCHES
    assert 0 < monitor.error_model()[0] <= 2.0**-8


def test_gradients_that_are_gone_are_told(tmp_path, caplog):
    # Manual optimization that zeroes right after the step leaves nothing to see.
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        monitor = watch("bf16")

        class Tidy(TwoOptimizers):
            def on_train_batch_end(self, *args):
                self.zero_grad()

            def training_step(self, batch, batch_idx):
                super().training_step(batch, batch_idx)
                self.zero_grad()

        trainer(tmp_path, callbacks=[monitor]).fit(Tidy(SGD), batches())
    assert monitor.error_model() is None
    assert "GradientErrorMonitor: no gradient was measured." in caplog.messages[-1]


def test_lines_name_compressor_model_and_floor(tmp_path, caplog):
    monitor = watch("bf16", problem=PROBLEM)
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        trainer(tmp_path, callbacks=[monitor]).fit(Regression(SGD), batches())
    first, last = (text for text in caplog.messages if text.startswith("GradientErrorMonitor"))
    assert "error of bf16 on the gradients of 49 parameters" in first
    delta, c = monitor.error_model()
    assert f"a relative error of {delta:.4g} and an absolute error of {c:.4g}" in last
    assert f"a squared distance of {biased_sgd_floor(PROBLEM, delta, c):.4g}." in last


def test_a_training_that_resumes_without_the_monitor_forgets_what_another_one_measured(tmp_path):
    # The step number says nothing about it: the checkpoint is from the middle of a training without a monitor.
    plain = trainer(tmp_path, max_epochs=1)
    plain.fit(Regression(SGD), batches())
    plain.save_checkpoint(tmp_path / "plain.ckpt")
    monitor = watch("bf16")
    trainer(tmp_path, callbacks=[monitor]).fit(Regression(SGD), batches())
    first = len(monitor.grad_sq)
    resumed = trainer(tmp_path, callbacks=[monitor], max_epochs=2)
    resumed.fit(Regression(SGD), batches(), ckpt_path=tmp_path / "plain.ckpt")
    assert 0 < len(monitor.grad_sq) < first


def test_it_looks_every_50_steps_by_default(tmp_path):
    assert GradientErrorMonitor().unit == "step"
    assert GradientErrorMonitor(every_n_epochs=2).unit == "epoch"
    monitor = GradientErrorMonitor(max_overhead=None)
    trainer(tmp_path, callbacks=[monitor], max_epochs=15).fit(Regression(SGD), batches())
    assert len(monitor.grad_sq) == 3  # after 50 and 100 steps, and at the end, 105


@pytest.mark.parametrize(
    ("settings", "argument"),
    [
        ({"compressor": "int16"}, "compressor"),
        ({"compressor": "topk", "topk_fraction": 2.0}, "topk_fraction"),
        ({"quantile": 0.0}, "quantile"),
        ({"window": 0}, "window"),
        ({"every_n_steps": 5, "every_n_epochs": 1}, "every_n_epochs"),
    ],
)
def test_impossible_settings_are_refused(settings, argument):
    with pytest.raises(ValueError, match=f"Expected `{argument}` to be"):
        GradientErrorMonitor(**settings)
