"""DiminishingLR against numbers by hand, and the theorems against the exact error of SGD on quadratics."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
from support.schedules import advance, sgd

from lightning_sgd import DiminishingLR, MaSS, OutsideIntendedUseWarning, diminishing_bound
from lightning_sgd.functional.step_size.diminishing import diminishing_steps

HERE = {"mu": 0.125, "L": 1.0}  # κ = 8; powers of two, so that numbers by hand are exact


@pytest.mark.parametrize(
    ("settings", "offset", "by_hand"),
    [
        # Theorem 2: E = 4L/μ = 32, η_0 = 2/(0.125·32) = 1/(2L), half of it after another 32 steps.
        ({}, 32, {0: 0.5, 32: 0.25, 96: 0.125}),
        # Theorem 5: E = max(2·10, 4·1·4/0.125 = 128), η_0 = 4/(0.125·128) = 1/4.
        ({"theorem": "hogwild", "max_delay": 10}, 128, {0: 0.25, 128: 0.125}),
        # The delay decides: E = max(2·100, 128).
        ({"theorem": "hogwild", "max_delay": 100}, 200, {0: 0.16, 200: 0.08}),
        # D = 3 filters: E = 384.
        ({"theorem": "hogwild", "max_delay": 10, "num_filters": 3}, 384, {0: 1 / 12}),
        # Theorem 6: κ times the offset of theorem 5.
        ({"theorem": "hogwild_nonconvex", "max_delay": 10}, 1024, {0: 1 / 32}),
        # Remark 5: α = 8, E = 256 = 2⁸, η = 4/(0.125·2⁸) = 1/8 until t + E = 512.
        (
            {"theorem": "hogwild", "form": "doubling"},
            256,
            {0: 1 / 8, 255: 1 / 8, 256: 1 / 16, 767: 1 / 16, 768: 1 / 32},
        ),
        # E = 384 lies inside [256, 512): the first step is 4/(0.125·256), and it halves 128 updates later.
        (
            {"theorem": "hogwild", "form": "doubling", "offset": 384.0},
            384,
            {0: 1 / 8, 127: 1 / 8, 128: 1 / 16},
        ),
    ],
)
def test_steps_by_hand(settings, offset, by_hand):
    schedule = DiminishingLR(sgd(0.1), **HERE, **settings)
    assert schedule.steps.offset == offset
    assert not list(schedule.steps.violations())
    lrs = [lr for (lr,) in advance(schedule, max(by_hand))]
    for step, expected in by_hand.items():
        assert lrs[step] == pytest.approx(expected, rel=1e-14), step


def test_both_forms_stay_in_the_corridor_of_remark_5():
    # 4/(μ(t+E)) ≤ η_t < 8/(μ(t+E)); the smooth form with α = 4 is the lower edge.
    for form, L, mu in product(("smooth", "doubling"), (1.0, 3.7), (0.125, 0.0123)):
        steps = diminishing_steps(mu, L, form=form, theorem="hogwild", max_delay=7)
        for t in (*range(3000), 10**6, 10**9):
            scaled = steps.at(t) * mu * (t + steps.offset)
            assert 4 * (1 - 1e-12) <= scaled < 8


@pytest.mark.parametrize("form", ["smooth", "doubling"])
def test_processes_count_for_themselves(form):
    # Each of P processes switches h after (2^h − E)/P of its own steps, without a shared counter.
    settings = {"theorem": "hogwild", "form": form, "max_delay": 16}
    one = advance(DiminishingLR(sgd(0.1), **HERE, **settings), 600)
    four = advance(DiminishingLR(sgd(0.1), **HERE, **settings, num_processes=4), 150)
    assert four == one[::4]
    if form == "doubling":
        first = [lr for (lr,) in four].index(1 / 16)
        assert first == (2**9 - 256) / 4


def exact_errors(schedule, eigenvalues, variances, w, num_steps):
    """E‖w_t − w*‖² of SGD on ½Σhᵢwᵢ² with gradient noise of these variances, coordinate by coordinate."""
    second, errors = np.array(w) ** 2, []
    for (lr,) in advance(schedule, num_steps):
        errors.append(second.sum())
        second = (1 - lr * np.array(eigenvalues)) ** 2 * second + lr**2 * np.array(variances)
    return errors


@pytest.mark.slow
@pytest.mark.parametrize("start", [0.0, 1.0, 30.0])
def test_theorem_2_bounds_the_exact_error(start):
    # The bound must hold; and the error must fall like 1/t, by the classical constant α²σ²/(μ²(2αh/μ − 1)).
    eigenvalues, variances = [0.125, 0.5, 1.0], [0.3, 0.1, 0.2]
    errors = exact_errors(
        DiminishingLR(sgd(0.1), **HERE), eigenvalues, variances, [start] * 3, 20_000
    )
    problem = {"noise": 2 * sum(variances), "initial_sq_distance": 3 * start**2}
    bounds = [diminishing_bound(t, **HERE, **problem) for t in range(20_001)]
    assert all(error <= bound for error, bound in zip(errors, bounds, strict=True))
    constants = [
        4 * v / 0.125**2 / (4 * h / 0.125 - 1) for h, v in zip(eigenvalues, variances, strict=True)
    ]
    assert 20_000 * errors[-1] == pytest.approx(sum(constants), rel=0.02)


def test_theorem_2_by_hand():
    # L = 1, μ = 1/8, N = 2, ‖w0−w*‖² = 64: T = 32·max(64/16, 1) − 32 = 96, and at t = T + 32 the bound is
    # 16·2·64/64 = 32. A smaller start has T = 0: at t = 0 the bound is 16·2·64/32 = 64.
    assert diminishing_bound(95, **HERE, noise=2.0, initial_sq_distance=64.0) == math.inf
    assert diminishing_bound(96, **HERE, noise=2.0, initial_sq_distance=64.0) == pytest.approx(64)
    assert diminishing_bound(128, **HERE, noise=2.0, initial_sq_distance=64.0) == pytest.approx(32)
    assert diminishing_bound(0, **HERE, noise=2.0, initial_sq_distance=1.0) == pytest.approx(64)
    assert diminishing_bound(9, **HERE, noise=0.0, initial_sq_distance=1.0) == math.inf
    assert diminishing_bound(9, **HERE, noise=0.0, initial_sq_distance=0.0) == 0


@pytest.mark.parametrize("form", ["smooth", "doubling"])
@pytest.mark.parametrize("delay", [0, 10, 100])
def test_delayed_updates_reach_the_leading_term_of_theorem_5(form, delay):
    # w_{t+1} = w_t − η_t(h·w_{t−τ} − noise): exact second moments by the impulse response of the recursion.
    h, variance, num_steps = 0.5, 0.25, 3000
    settings = {"mu": h, "L": h, "theorem": "hogwild", "form": form, "max_delay": delay}
    lrs = [lr for (lr,) in advance(DiminishingLR(sgd(0.1), **settings), num_steps)]
    w = np.zeros((num_steps + 1, num_steps))  # w_t as a linear function of the noises
    for t in range(num_steps):
        w[t + 1] = w[t] - lrs[t] * h * w[max(t - delay, 0)]
        w[t + 1, t] += lrs[t]
    errors = variance * (w**2).sum(axis=1)
    alpha, offset = (4, max(2 * delay, 16)) if form == "smooth" else (8, max(2 * delay, 32))
    t = np.arange(num_steps // 2, num_steps)
    leading = 4 * alpha**2 * (2 * variance) / h**2 * t / (t + offset - 1) ** 2
    assert (errors[t] <= leading).all()


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"alpha": 3.0}, "Theorem 2 is about `alpha` = 2, got 3, .*Theorem 1"),
        ({"form": "doubling"}, "Theorem 2 is about the smooth form; set `theorem`"),
        ({"max_delay": 3}, "Theorem 2 is about SGD alone, got `max_delay` = 3"),
        ({"num_filters": 2}, "got `num_filters` = 2; set `theorem` to hogwild"),
        ({"num_processes": 2}, "got `num_processes` = 2; set `theorem` to hogwild"),
        ({"offset": 31.0}, "Theorem 2 needs `offset` ≥ 32 here, got 31"),
        # The condition is 4 ≤ α_t: α = 2 belongs to theorem 2.
        ({"theorem": "hogwild", "alpha": 2.0}, "Theorem 5 needs 4 ≤ α_t .* set `alpha` to 4"),
        (
            {"theorem": "hogwild", "alpha": 4.0, "form": "doubling"},
            "gives 2; set `alpha` to 8 or more",
        ),
        ({"theorem": "hogwild", "offset": 100.0}, "Theorem 5 needs `offset` ≥ 128"),
        ({"theorem": "hogwild_nonconvex", "offset": 128.0}, "Theorem 6 needs `offset` ≥ 1024"),
        ({"theorem": "hogwild", "num_processes": 4, "max_delay": 2}, "4 processes miss 3 updates"),
    ],
)
def test_a_violated_condition_is_told(settings, sentence):
    with pytest.warns(OutsideIntendedUseWarning, match=sentence):
        DiminishingLR(sgd(0.1), **HERE, **settings)


def test_other_steps_than_those_of_sgd_are_told():
    optimizer = sgd(0.1)
    for group in optimizer.param_groups:
        group["momentum"] = 0.9
    with pytest.warns(OutsideIntendedUseWarning, match="SGD without momentum; set `momentum` to 0"):
        DiminishingLR(optimizer, **HERE)
    with pytest.warns(OutsideIntendedUseWarning, match="about plain SGD, and MaSS makes other"):
        DiminishingLR(MaSS(optimizer.param_groups[0]["params"], lr=0.1), **HERE)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("mu", 0.0),
        ("mu", math.nan),
        ("L", 0.1),
        ("L", math.inf),
        ("alpha", 0.0),
        ("alpha", math.inf),
        ("max_delay", -1),
        ("num_filters", 0),
        ("num_processes", 0),
        ("offset", 0.0),
    ],
)
def test_impossible_settings_are_refused(argument, value):
    with pytest.raises(ValueError, match=f"Expected `{argument}` to be"):
        DiminishingLR(sgd(0.1), **{**HERE, argument: value})


@pytest.mark.parametrize(
    ("argument", "value"), [("num_updates", -1), ("noise", -1.0), ("initial_sq_distance", math.inf)]
)
def test_the_bound_refuses_impossible_numbers(argument, value):
    given = {"num_updates": 1, "noise": 1.0, "initial_sq_distance": 1.0, argument: value}
    with pytest.raises(ValueError, match=f"Expected `{argument}` to be"):
        diminishing_bound(**HERE, **given)


def test_the_step_of_the_optimizer_does_not_matter():
    assert advance(DiminishingLR(sgd(3.0), **HERE), 5) == advance(
        DiminishingLR(sgd(1e-9), **HERE), 5
    )
    assert advance(DiminishingLR(sgd(0.0), **HERE), 5) == advance(
        DiminishingLR(sgd(1e-9), **HERE), 5
    )


@pytest.mark.parametrize("form", ["smooth", "doubling"])
def test_a_schedule_called_once_per_epoch_counts_steps(form):
    # With interval: epoch the count would otherwise be that of epochs, and the step would hardly fall.
    settings = {"theorem": "hogwild", "form": form}
    each = advance(DiminishingLR(sgd(0.1), **HERE, **settings), 700)
    per_epoch = DiminishingLR(sgd(0.1), **HERE, **settings, num_steps_per_call=7)
    assert advance(per_epoch, 100) == each[::7]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"form": "smoth"}, "Expected `form` to be one of smooth, doubling, got 'smoth'"),
        (
            {"theorem": "hogwld"},
            "Expected `theorem` to be one of serial, hogwild, hogwild_nonconvex, got 'hogwld'",
        ),
    ],
)
def test_misspelt_choices_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        DiminishingLR(sgd(0.1), 0.1, 1.0, **settings)
