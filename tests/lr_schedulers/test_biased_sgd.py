"""BiasedSGDLR against the formulas of the analysis in NumPy, a solver for semidefinite programmes, and by hand."""

from __future__ import annotations

import copy
import math
import warnings

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from support.schedules import advance, sgd
from support.training import trainer
from support.watching import assert_equal
from torch.optim.lr_scheduler import ChainedScheduler, ConstantLR

from lightning_sgd import (
    BiasedSGDLR,
    BiasedSGDProblem,
    DigitsClassifier,
    DigitsDataModule,
    GradientErrorMonitor,
    MaSS,
    OutsideIntendedUseWarning,
    biased_sgd_bound,
    biased_sgd_sdp,
    optimal_step,
)

SHIFTED = BiasedSGDProblem(m=1.0, assumption="shifted", G2=1.0)
STRONG = BiasedSGDProblem(m=1.0, L=10.0, G2=1.0)


def by_numpy(problem, U, delta, c, num_steps, max_lr):
    """Step sizes and bounds where the closed form holds, from the formulas as printed."""
    M = {"shifted": problem.m**2, "smooth": 2 * (problem.L or 0) ** 2}[problem.assumption]
    m, G2, lrs, bounds = problem.m, problem.G2, [], []
    for _ in range(num_steps):
        bounds.append(U)
        P = M * U + 2 * G2
        q2 = delta**2 * P + c**2
        alpha = (m * U - np.sqrt(q2) * np.sqrt(U * (P - m * m * U) / (P - q2))) / P
        alpha = min(alpha, max_lr) if q2 < m * m * U else 0.0
        lrs.append(alpha)
        A = (1 - 2 * m * alpha + M * alpha**2) * U + 2 * alpha**2 * G2
        U = (np.sqrt(A) + alpha * np.sqrt(q2)) ** 2
    return lrs, bounds


@pytest.mark.parametrize(
    ("problem", "max_lr"),
    [(SHIFTED, 0.5), (BiasedSGDProblem(m=1.0, L=3.0, assumption="smooth", G2=1.0), 1 / 18)],
)
def test_steps_and_bounds_are_those_of_the_formulas(problem, max_lr):
    # The default limit is 1/(2·M21), or m/M̃ where M21 is zero.
    schedule = BiasedSGDLR(sgd(0.1), problem, U0=9.0, delta=0.02, c=0.05)
    lrs, bounds = [], []
    for _ in range(200):
        lrs.append(schedule.get_last_lr()[0])
        bounds.append(schedule.U)
        advance(schedule, 1)
    expected = by_numpy(problem, 9.0, 0.02, 0.05, 200, max_lr)
    np.testing.assert_allclose(lrs, expected[0], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(bounds, expected[1], rtol=1e-9)
    assert lrs[0] == max_lr or problem is not SHIFTED


def test_the_first_step_by_hand():
    # The number of the paper's analysis for m = U = G2 = 1, δ = 0.05, c = 0.1.
    schedule = BiasedSGDLR(sgd(0.1), SHIFTED, U0=1.0, delta=0.05, c=0.1)
    assert schedule.get_last_lr() == pytest.approx([0.29722374], abs=5e-9)
    advance(schedule, 1)
    assert pytest.approx(0.73652012, abs=5e-9) == schedule.U


def test_the_bound_is_certified_by_a_solver_where_a_search_is_needed():
    # Where the closed form does not hold; a chained factor makes the step another one than the planned one.
    optimizer = sgd(0.1)
    ours = BiasedSGDLR(optimizer, STRONG, U0=1.0, delta=0.05, c=0.1, max_lr=1.0)
    assert ours.get_last_lr()[0] == pytest.approx(0.0808545, abs=5e-7)
    chain = ChainedScheduler([ours, ConstantLR(optimizer, 0.5, total_iters=100)], optimizer)
    U = 1.0
    for _ in range(4):
        U = biased_sgd_sdp(STRONG, optimizer.param_groups[0]["lr"], U, 0.05, 0.1)
        advance(chain, 1)
        assert pytest.approx(U, rel=1e-6) == ours.U
        planned = optimal_step(STRONG, ours.U, 0.05, 0.1)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(planned / 2, rel=2e-3)


def test_a_search_is_made_once_for_a_while(monkeypatch):
    # Some milliseconds at every step would be felt; the bound is followed exactly all the same.
    import lightning_sgd.lr_schedulers.biased_sgd as module

    calls = []
    monkeypatch.setattr(
        module, "optimal_step", lambda *args: calls.append(args) or optimal_step(*args)
    )
    slow = BiasedSGDProblem(m=0.01, L=10.0, G2=1.0)
    schedule = BiasedSGDLR(sgd(0.1), slow, U0=1e5, delta=0.02, max_lr=1.0)
    lrs = [lr for (lr,) in advance(schedule, 60)]
    assert 1 <= len(calls) < 40
    assert pytest.approx(biased_sgd_bound(slow, lrs[:-1], 1e5, 0.02)[-1]) == schedule.U
    for _, U, *_ in calls[:3]:
        assert U <= 1e5


def test_resume_within_a_search_is_bit_exact():
    # The step size that was kept for a while is part of the state.
    slow = BiasedSGDProblem(m=0.01, L=10.0, G2=1.0)

    def make():
        return BiasedSGDLR(sgd(0.1), slow, U0=1e5, delta=0.02, max_lr=1.0)

    through = make()
    advance(through, 7)
    saved = copy.deepcopy((through.optimizer.state_dict(), through.state_dict()))
    expected = advance(through, 40)
    resumed = make()
    resumed.optimizer.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    assert advance(resumed, 40) == expected
    assert resumed.U == through.U


@pytest.mark.parametrize(("min_lr", "rest"), [(0.0, "the parameters stay"), (0.01, "`min_lr`")])
def test_no_certain_step_is_told_once_with_floor_and_budget(min_lr, rest):
    # α* = 0 is a legitimate answer, but a training that stands still must say so.
    # Floor (0.01 + 2·0.01)/(1 − 0.01) = 0.0303; from U = 0.02 not even δ = 0.07 would do: √((0.02 − 0.01)/2.02).
    with pytest.warns(OutsideIntendedUseWarning) as caught:
        schedule = BiasedSGDLR(sgd(0.1), SHIFTED, U0=0.02, delta=0.1, c=0.1, min_lr=min_lr)
    assert len(caught) == 1
    lrs = advance(schedule, 5)  # a second warning would be an error
    sentence = str(caught[0].message)
    for part in ("U = 0.02 ", "the floor is 0.0303", "needs delta < 0.07036", rest):
        assert part in sentence, sentence
    assert lrs == [[min_lr]] * 6
    assert (schedule.U > 0.02) == (min_lr > 0)


def test_a_bound_that_explodes_does_not_end_the_training():
    # Somebody forces steps that are much too long: the bound says nothing any more, and the schedule goes on.
    schedule = BiasedSGDLR(sgd(0.1), STRONG, U0=1.0, delta=0.01, min_lr=3.0, max_lr=3.0)
    lrs = advance(schedule, 400)
    assert lrs[-1] == [3.0]
    assert 1e100 < schedule.U < math.inf


@pytest.mark.slow
def test_it_stops_above_the_floor_and_not_before():
    floor = (0.02**2 + 2 * 0.02**2) / (1 - 0.02**2)
    schedule = BiasedSGDLR(sgd(0.1), SHIFTED, U0=1.0, delta=0.02, c=0.02)
    advance(schedule, 20_000)
    assert floor < schedule.U < 1.3 * floor


class Source:
    """Says what it is told to say."""

    def __init__(self, model=None):
        self.model = model

    def error_model(self):
        return self.model


def test_a_monitor_is_asked_at_every_step():
    source = Source()
    schedule = BiasedSGDLR(sgd(0.1), SHIFTED, U0=1.0, delta=0.05, c=0.1, monitor=source)
    assert schedule.get_last_lr()[0] == pytest.approx(0.29722374, abs=5e-9)
    source.model = (0.9, 0.0)
    with pytest.warns(OutsideIntendedUseWarning, match=r"delta = 0\.9"):
        lrs = advance(schedule, 2)
    assert lrs[-1] == [0.0]
    assert (schedule.delta, schedule.c) == (0.9, 0.0)
    source.model = (0.01, 0.0)  # a better compressor: it goes on from where it was
    assert advance(schedule, 1)[-1][0] == pytest.approx(optimal_step(SHIFTED, schedule.U, 0.01))


def test_a_monitor_is_no_part_of_the_state():
    schedule = BiasedSGDLR(sgd(0.1), SHIFTED, U0=1.0, monitor=Source((0.01, 0.0)))
    assert "monitor" not in schedule.state_dict()
    assert schedule.state_dict()["delta"] == 0.01


def test_calls_once_per_epoch_follow_every_step():
    schedule = BiasedSGDLR(sgd(0.1), SHIFTED, U0=1.0, delta=0.05, num_steps_per_call=7)
    first = schedule.get_last_lr()[0]
    advance(schedule, 1)
    assert pytest.approx(biased_sgd_bound(SHIFTED, [first] * 7, 1.0, 0.05)[-1]) == schedule.U


@pytest.mark.parametrize("optimizer", ["momentum", "MaSS"])
def test_other_steps_than_those_of_sgd_are_told(optimizer):
    plain = sgd(0.1)
    plain.param_groups[0]["momentum"] = 0.9
    other = MaSS(plain.param_groups[0]["params"], lr=0.1)
    with pytest.warns(OutsideIntendedUseWarning, match=r"plain SGD, and MaSS|without momentum"):
        BiasedSGDLR(plain if optimizer == "momentum" else other, SHIFTED, U0=1.0)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("U0", 0.0),
        ("U0", math.inf),
        ("delta", -1.0),
        ("c", math.nan),
        ("min_lr", -0.1),
        ("max_lr", 0.0),
        ("max_lr", math.nan),
    ],
)
def test_impossible_settings_are_refused(argument, value):
    with pytest.raises(ValueError, match=f"Expected `{argument}` to be"):
        BiasedSGDLR(sgd(0.1), SHIFTED, **{"U0": 1.0, argument: value})
    with pytest.raises(ValueError, match=r"Expected `max_lr` to be at least min_lr = 0\.3, got"):
        BiasedSGDLR(sgd(0.1), SHIFTED, U0=1.0, min_lr=0.3, max_lr=0.2)


def test_a_measuring_monitor_drives_the_schedule_and_both_resume(tmp_path):
    # In Python the two are connected: what int4 would cost on live gradients decides on the steps.
    problem = BiasedSGDProblem(m=0.05, L=13.0, G2=0.01)

    class Model(DigitsClassifier):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), weight_decay=0.05)
            schedule = BiasedSGDLR(optimizer, problem, U0=20.0, monitor=self.trainer.callbacks[0])
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": schedule, "interval": "step"},
            }

    def fit(folder, resume_from=None):
        monitor = GradientErrorMonitor("int4", problem=problem, every_n_steps=2, max_overhead=None)
        keep = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
        data = DigitsDataModule(num_val=897, num_test=500)
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The dirpath has changed")
            trainer(
                folder,
                max_epochs=-1,
                max_steps=12,
                enable_checkpointing=True,
                callbacks=[monitor, keep],
            ).fit(Model(hidden_sizes=[]), datamodule=data, ckpt_path=resume_from)
        return monitor, torch.load(folder / "step=12.ckpt", weights_only=True)

    monitor, through = fit(tmp_path / "through")
    _, resumed = fit(tmp_path / "resumed", tmp_path / "through" / "step=5.ckpt")
    for part in ("state_dict", "optimizer_states", "lr_schedulers"):
        assert_equal(resumed[part], through[part], part)
    state = through["lr_schedulers"][0]
    assert 0 < state["delta"] + state["c"] < 1
    assert len(monitor.grad_sq) == 6
    assert through["optimizer_states"][0]["param_groups"][0]["lr"] > 0
