"""The bounds of biased SGD against a solver for semidefinite programmes, numbers by hand, and simulation."""

from __future__ import annotations

import builtins
import itertools
import math
import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_sgd import (
    BiasedSGDProblem,
    biased_sgd_bound,
    biased_sgd_floor,
    biased_sgd_sdp,
    biased_sgd_step_bound,
    max_relative_error,
    optimal_step,
)

ASSUMPTIONS = ("smooth", "convex", "strongly_convex", "shifted")


def problem(assumption, m=1.0, L=10.0, G2=1.0):
    return BiasedSGDProblem(m=m, L=L, assumption=assumption, G2=G2)


def coefficients(assumption, m, L):
    """M11 and M21 as the paper's table has them."""
    return {
        "smooth": (2 * L * L, 0.0),
        "convex": (0.0, L),
        "strongly_convex": (-2 * m * L, L + m),
        "shifted": (-m * m, m),
    }[assumption]


def lmi(assumption, m, L, alpha, delta, bound):
    """The matrix of the paper, unscaled."""
    M11, M21 = coefficients(assumption, m, L)
    corner = 1 - bound.rho2 - 2 * m * bound.nu + bound.lam * M11
    side = -alpha + bound.nu + bound.lam * M21
    return np.array(
        [
            [corner, side, -alpha],
            [side, alpha**2 - bound.lam + bound.zeta * delta**2, alpha**2],
            [-alpha, alpha**2, alpha**2 - bound.zeta],
        ]
    )


def by_solver(assumption, m, L, G2, alpha, U, delta, c):
    """The semidefinite programme written out once more, with matrices for the three inequalities."""
    import cvxpy as cp

    M11, M21 = coefficients(assumption, m, L)
    step = np.outer([1, -1, -1], [1, -1, -1])  # ‖ξ − u − e‖², u and e in units of α
    before = np.diag([1, 0, 0])
    convexity = np.array([[2 * m * alpha, -1, 0], [-1, 0, 0], [0, 0, 0]])
    gradient = np.array([[-M11 * alpha**2, -M21 * alpha, 0], [-M21 * alpha, 1, 0], [0, 0, 0]])
    error = np.diag([0, -(delta**2), 1])
    rho2, nu, lam, zeta = weights = cp.Variable(4, nonneg=True)
    proof = step - rho2 * before - nu * convexity - lam * gradient - zeta * error
    total = U * rho2 + alpha**2 * (2 * G2 * lam + c**2 * zeta)
    programme = cp.Problem(cp.Minimize(total), [proof << 0])
    programme.solve(solver=cp.CLARABEL)
    assert weights.value is not None, programme.status
    return programme.value


def grid():
    """Settings on both sides of every border: errors none, small, large; steps small and beyond 1/M21."""
    rng = random.Random(0)
    for assumption in ASSUMPTIONS:
        for share, delta, c in itertools.product(
            (0.02, 0.5, 1.3), (0.0, 0.05, 0.4), (0.0, 0.1, 1.0)
        ):
            m, L = 10 ** rng.uniform(-1, 0), 10 ** rng.uniform(0.1, 1.1)
            U, G2 = 10 ** rng.uniform(-1, 1), 10 ** rng.uniform(-2, 1)
            M21 = coefficients(assumption, m, L)[1] or 2 * L
            yield assumption, m, L, G2, share / M21, U, delta, c


@pytest.mark.parametrize("setting", list(grid()), ids=lambda setting: setting[0])
def test_one_step_is_the_semidefinite_programme(setting):
    # 108 settings: the closed form, or the search over one number, is the optimum of the solver.
    assumption, m, L, G2, alpha, U, delta, c = setting
    ours = biased_sgd_step_bound(problem(assumption, m, L, G2), alpha, U, delta, c)
    assert ours.U_next == pytest.approx(by_solver(*setting), rel=2e-6)


@pytest.mark.parametrize("setting", list(grid()), ids=lambda setting: setting[0])
def test_the_weights_prove_the_bound(setting):
    # A certificate that anybody can check: the matrix is negative semidefinite, and the weights give the number.
    assumption, m, L, G2, alpha, U, delta, c = setting
    ours = biased_sgd_step_bound(problem(assumption, m, L, G2), alpha, U, delta, c)
    total = ours.rho2 * U + 2 * ours.lam * G2 + (ours.zeta * c**2 if c else 0.0)
    assert ours.U_next == pytest.approx(total, rel=1e-9)
    assert min(ours.rho2, ours.nu, ours.lam, ours.zeta) >= 0
    if math.isinf(ours.zeta):  # without an error its row is deleted
        assert delta == c == 0
        matrix = lmi(assumption, m, L, alpha, 0.0, replace(ours, zeta=0.0))[:2, :2]
    else:
        matrix = lmi(assumption, m, L, alpha, delta, ours)
    units = np.array([1, alpha, alpha])[
        : len(matrix)
    ]  # a congruence: the signs of the eigenvalues stay
    values = np.linalg.eigvalsh(matrix / np.outer(units, units))
    assert values.max() < 1e-9 * max(1, -values.min())


def test_both_branches_are_on_the_grid():
    branches = [
        biased_sgd_step_bound(problem(a, m, L, G2), alpha, U, delta, c).branch
        for a, m, L, G2, alpha, U, delta, c in grid()
    ]
    assert min(branches.count(name) for name in ("closed_form", "searched")) >= 20


def test_one_step_by_hand():
    # A = (1 − 0.02 + 2·10⁻⁴)·1 + 2·10⁻⁴ = 0.9804, B = 10⁻⁴(0.01·(2 + 2) + 0.04) = 8·10⁻⁶.
    bound = biased_sgd_step_bound(problem("strongly_convex"), 0.01, 1.0, 0.1, 0.2)
    assert bound.U_next == pytest.approx((math.sqrt(0.9804) + math.sqrt(8e-6)) ** 2, rel=1e-14)
    assert bound.U_next == pytest.approx(0.98600914, abs=5e-9)
    weights = (bound.rho2, bound.nu, bound.lam, bound.zeta)
    assert weights == pytest.approx((0.98370214, 0.00506364, 4.513571e-4, 0.03510714), rel=2e-6)
    values = np.linalg.eigvalsh(lmi("strongly_convex", 1.0, 10.0, 0.01, 0.1, bound))
    assert values == pytest.approx([-0.03786, 0, 0], abs=5e-6)


@pytest.mark.parametrize(
    ("assumption", "alpha", "U", "delta", "c", "G2", "expected"),
    [
        ("smooth", 0.01, 1.0, 0.05, 0.0, 1.0, 1.01446459),
        ("convex", 0.01, 1.0, 0.05, 0.0, 1.0, 0.98685398),
        ("strongly_convex", 0.01, 1.0, 0.05, 0.0, 1.0, 0.98238130),
        ("shifted", 0.01, 1.0, 0.05, 0.0, 1.0, 0.98201566),
        # Without the guard for ν < 0 these two would be 1.00735464 and 4.54000.
        ("convex", 0.002, 1.0, 0.6, 0.0, 1.0, 1.00774988),
        ("strongly_convex", 0.09, 5.0, 0.3, 0.1, 0.01, 10.699987),
    ],
)
def test_values_of_the_solver_that_were_published(assumption, alpha, U, delta, c, G2, expected):
    bound = biased_sgd_step_bound(problem(assumption, G2=G2), alpha, U, delta, c)
    assert bound.U_next == pytest.approx(expected, rel=2e-8)
    assert biased_sgd_sdp(problem(assumption, G2=G2), alpha, U, delta, c) == pytest.approx(
        expected, rel=2e-7
    )


@pytest.mark.parametrize("assumption", ["convex", "strongly_convex"])
def test_without_error_it_is_the_textbook(assumption):
    # 1 − 2mα + 2mLα² and offset 2α²G2 for convex functions: not the weaker 1 − mα of a vanishing error.
    alpha, U, G2 = 0.03, 2.0, 1.5
    M = {"convex": 2 * 10.0, "strongly_convex": 2.0}[assumption]
    bound = biased_sgd_step_bound(problem(assumption, G2=G2), alpha, U)
    assert bound.U_next == pytest.approx((1 - 2 * alpha + M * alpha**2) * U + 2 * alpha**2 * G2)
    assert bound.lam == pytest.approx(alpha**2)


@pytest.mark.parametrize(
    ("assumption", "alpha", "U_next"),
    [
        ("shifted", 0.29722374, 0.73652012),
        ("smooth", 0.00140212, 0.99960389),
        ("convex", 0.03411554, 0.97447050),
        # The formula says 0.21930 here, where ν would be negative.
        ("strongly_convex", 0.0808545, 0.88845383),
    ],
)
def test_best_steps(assumption, alpha, U_next):
    best = optimal_step(problem(assumption), U=1.0, delta=0.05, c=0.1)
    assert best == pytest.approx(alpha, abs=5e-8 if assumption != "strongly_convex" else 5e-7)
    bound = biased_sgd_step_bound(problem(assumption), best, 1.0, 0.05, 0.1).U_next
    assert bound == pytest.approx(U_next, abs=1e-8)


@pytest.mark.parametrize("assumption", ASSUMPTIONS)
@pytest.mark.parametrize(("delta", "c"), [(0.0, 0.0), (0.03, 0.0), (0.0, 0.2), (0.05, 0.1)])
@pytest.mark.parametrize("U", [0.1, 1.0, 20.0])
def test_no_step_of_a_dense_grid_is_better(assumption, delta, c, U):
    def bound(alpha):
        return biased_sgd_step_bound(problem(assumption), alpha, U, delta, c).U_next

    best = optimal_step(problem(assumption), U, delta, c)
    others = min(bound(10**exponent) for exponent in np.linspace(-5, 0.5, 400))
    assert bound(best) <= others * (1 + 1e-9)
    assert bound(best) <= U


def limit(assumption, alpha, delta, num_steps):
    return biased_sgd_bound(problem(assumption), [alpha] * num_steps, 5.0, delta)[-1]


@pytest.mark.slow
def test_floor_by_hand_and_limits_of_constant_steps():
    # 2·0.01/(1 − 2·0.01) = 0.0204; constant steps stop above it, the closer the smaller they are.
    here = problem("strongly_convex")
    assert biased_sgd_floor(here, delta=0.1) == pytest.approx(0.02 / 0.98, rel=1e-12)
    for alpha, expected in [(0.01, 0.038597), (0.001, 0.022427)]:
        assert limit("strongly_convex", alpha, 0.1, 40_000) == pytest.approx(expected, rel=5e-5)
    near = biased_sgd_bound(here, [1e-4] * 2, 0.0206139 * (1 + 1e-3), 0.1)
    rate = (near[1] - 0.0206139) / (near[0] - 0.0206139)
    assert rate == pytest.approx(0.999902, abs=2e-6)  # 1 − α(m² − M̃δ²)/m
    assert biased_sgd_step_bound(here, 1e-4, 0.0206139, 0.1).U_next == pytest.approx(
        0.0206139, rel=1e-7
    )


@pytest.mark.parametrize(
    ("assumption", "delta", "low", "high"),
    [
        # The formula would say 0.47059; a step of 10⁻⁴ stops at 3.215.
        ("strongly_convex", 0.4, 3.125 - 1e-9, 3.125 + 1e-9),
        ("strongly_convex", 0.6, math.inf, math.inf),
        ("convex", 0.2, 0.4 - 1e-9, 0.4 + 1e-9),
        ("convex", 0.3, math.inf, math.inf),
        ("smooth", 0.08, math.inf, math.inf),
        ("shifted", 0.9, 2 * 0.81 / 0.19 - 1e-9, 2 * 0.81 / 0.19 + 1e-9),
    ],
)
def test_floor_where_the_formula_ends(assumption, delta, low, high):
    assert low <= biased_sgd_floor(problem(assumption), delta) <= high


def test_floor_beyond_the_formula_is_where_the_solver_stops():
    # A little above the floor a small step helps, a little below none does.
    here, floor = problem("strongly_convex"), biased_sgd_floor(problem("strongly_convex"), 0.4)
    assert biased_sgd_step_bound(here, 1e-4, 3.215, 0.4).U_next == pytest.approx(3.215, rel=1e-5)
    setting = ("strongly_convex", 1.0, 10.0, 1.0)
    assert by_solver(*setting, 1e-3, 4 * floor, 0.4, 0.0) < 4 * floor * (1 - 1e-5)
    assert by_solver(*setting, 1e-3, 0.8 * floor, 0.4, 0.0) > 0.8 * floor * (1 + 1e-5)
    assert optimal_step(here, 1.02 * floor, 0.4) > 0
    assert optimal_step(here, 0.98 * floor, 0.4) == 0


@pytest.mark.parametrize("assumption", ASSUMPTIONS)
@pytest.mark.parametrize("U", [None, 0.05, 3.0, 1000.0])
def test_the_budget_is_where_progress_ends(assumption, U):
    budget = max_relative_error(problem(assumption), U, c=0.0)
    start = 1e9 if U is None else U
    assert 0 < budget < 1.01
    assert optimal_step(problem(assumption), start, 0.98 * budget) > 0
    assert optimal_step(problem(assumption), start, 1.02 * budget) == 0
    if U is None:
        assert biased_sgd_floor(problem(assumption), 0.98 * budget) < math.inf
        assert biased_sgd_floor(problem(assumption), 1.02 * budget) == math.inf


def test_the_budget_by_hand():
    # √((1·3 − 1)/(20·3 + 2)) for convex functions; none is left when c² ≥ m²U.
    assert max_relative_error(problem("convex"), 3.0, c=1.0) == pytest.approx(math.sqrt(2 / 62))
    assert max_relative_error(problem("convex"), 1.0, c=1.0) == 0
    assert max_relative_error(problem("convex"), 0.0) == 0
    # The closed form holds up to δ² = m/M21: 0.3015 here; √(m²/M̃) = 0.707 would be too much.
    assert 0.3015 < max_relative_error(problem("strongly_convex")) < 0.6


@pytest.mark.slow
def test_optimal_steps_reach_the_rate_of_the_theory():
    # δ = c = 0, m = 1, M̃ = 2, G2 = 1: U_k → 2·G2/(m²·k).
    here, U = problem("strongly_convex"), 1.0
    for _ in range(100_000):
        U = biased_sgd_step_bound(here, optimal_step(here, U), U).U_next
    assert pytest.approx(2.0002, abs=5e-5) == 100_000 * U


NUMBER = st.floats(0.0, 2.0)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(ASSUMPTIONS), st.floats(1e-4, 0.3), NUMBER, NUMBER, NUMBER, NUMBER, NUMBER)
def test_more_error_noise_or_distance_never_helps(assumption, alpha, delta, c, U, G2, more):
    # Measured quantities are rounded up in practice; that must be safe.
    def bound(delta=delta, c=c, U=U, G2=G2):
        return biased_sgd_step_bound(problem(assumption, G2=G2), alpha, U, delta, c).U_next

    now = bound()
    for larger in (
        bound(delta=delta + more),
        bound(c=c + more),
        bound(U=U + more),
        bound(G2=G2 + more),
    ):
        assert larger >= now * (1 - 1e-8) - 1e-300


@pytest.mark.parametrize("seed", range(4))
def test_a_simulation_never_exceeds_the_bound(seed):
    # Diagonal quadratics with spectra in [1, 10]; an error of exact size pushes away from the optimum.
    rng = np.random.default_rng(seed)
    hessians = rng.uniform(1, 10, size=(8, 5))
    centres = rng.normal(size=(8, 5)) * 0.3
    optimum = (hessians * centres).sum(axis=0) / hessians.sum(axis=0)
    G2 = ((hessians * (optimum - centres)) ** 2).sum(axis=1).mean()
    here = problem("strongly_convex", G2=G2)
    delta, c, num_steps = 0.05, 0.05, 300
    x = np.tile(optimum + 1.0, (2000, 1))
    U, worst = float(((x[0] - optimum) ** 2).sum()), 0.0
    for step in range(num_steps):
        alpha = optimal_step(here, U, delta, c) if step % 2 else 0.02
        U = biased_sgd_step_bound(here, alpha, U, delta, c).U_next
        chosen = rng.integers(8, size=len(x))
        u = hessians[chosen] * (x - centres[chosen])
        away = x - optimum
        length = np.sqrt(delta**2 * (u**2).sum(axis=1) + c**2)
        error = -length[:, None] * away / np.linalg.norm(away, axis=1, keepdims=True)
        x = x - alpha * (u + error)
        mean = ((x - optimum) ** 2).sum(axis=1).mean()
        worst = max(worst, mean / U)
    assert 0.05 < worst < 1


def test_the_bound_is_attained_in_one_dimension():
    # f = x²/2, all alike: ‖ξ‖ after a step is (1 − α + αδ)‖ξ‖ exactly, and so is the bound.
    here = BiasedSGDProblem(m=1.0, assumption="shifted", G2=0.0)
    bound = biased_sgd_step_bound(here, 0.2, 4.0, delta=0.1).U_next
    assert bound == pytest.approx((1 - 0.2 + 0.2 * 0.1) ** 2 * 4)


@pytest.mark.parametrize("assumption", ASSUMPTIONS)
def test_nothing_to_do_at_the_optimum(assumption):
    # U = 0, G2 = 0: no step, no bound above zero, no division by zero.
    here = problem(assumption, G2=0.0)
    assert optimal_step(here, 0.0) == 0
    assert biased_sgd_step_bound(here, 0.05, 0.0).U_next == 0
    assert biased_sgd_step_bound(here, 0.05, 0.0, 0.5).U_next == 0
    assert biased_sgd_step_bound(here, 0.05, 0.0, 0.5, 0.1).U_next == pytest.approx(
        0.05**2 * 0.1**2
    )
    assert biased_sgd_floor(here) == 0


def test_steps_that_underflow_in_single_precision_are_told_apart():
    # α² = 10⁻⁴⁶ is zero in float32.
    bound = biased_sgd_step_bound(problem("strongly_convex"), 1e-23, 1.0, 0.1)
    assert 0 < bound.lam < 1e-22
    assert bound.zeta > 0


def test_a_bound_that_explodes_ends_in_infinity_and_not_in_an_error():
    bounds = biased_sgd_bound(problem("strongly_convex"), [3.0] * 400, 1.0, 0.5)
    assert bounds[-1] == math.inf
    assert all(before < after for before, after in itertools.pairwise(bounds[:20]))


@pytest.mark.parametrize(
    ("settings", "argument"),
    [
        ({"m": 0.0, "L": 1.0}, "m"),
        ({"m": math.nan, "L": 1.0}, "m"),
        ({"m": 1.0}, "L"),
        ({"m": 1.0, "L": 0.5}, "L"),
        ({"m": 1.0, "L": math.inf}, "L"),
        ({"m": 1.0, "L": 2.0, "G2": -1.0}, "G2"),
        ({"m": 1.0, "L": 2.0, "assumption": "concave"}, "assumption"),
    ],
)
def test_impossible_problems_are_refused(settings, argument):
    with pytest.raises(ValueError, match=f"Expected `{argument}` to be"):
        BiasedSGDProblem(**{"G2": 1.0, **settings})


def test_the_noise_must_be_given():
    # Without noise every bound is far too good; that must not happen by forgetting it.
    with pytest.raises(TypeError, match="G2"):
        BiasedSGDProblem(m=1.0, L=2.0)


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_impossible_numbers_are_refused(value):
    here = problem("convex")
    with pytest.raises(ValueError, match="Expected `alpha` to be"):
        biased_sgd_step_bound(here, value, 1.0)
    for function in (optimal_step, lambda p, U, *e: biased_sgd_step_bound(p, 0.1, U, *e)):
        with pytest.raises(ValueError, match="Expected `U` to be"):
            function(here, value)
        with pytest.raises(ValueError, match="Expected `delta` to be"):
            function(here, 1.0, value)
        with pytest.raises(ValueError, match="Expected `c` to be"):
            function(here, 1.0, 0.0, value)
    with pytest.raises(ValueError, match="Expected `c` to be"):
        biased_sgd_floor(here, 0.0, value)
    with pytest.raises(ValueError, match="Expected `U` to be"):
        max_relative_error(here, value)


def test_the_solver_refuses_what_is_no_step():
    with pytest.raises(ValueError, match="Expected `alpha` to be a positive number"):
        biased_sgd_sdp(problem("convex"), 0.0, 1.0)


def test_a_missing_solver_is_told_with_the_extra(monkeypatch):
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name == "cvxpy":
            raise ModuleNotFoundError("No module named 'cvxpy'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lightning-sgd\[certify\]'"):
        biased_sgd_sdp(problem("convex"), 0.1, 1.0)
