"""Constants of least squares against numbers by hand, Gaussian moments, and the exact recursion of mini-batch SGD."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.least_squares import (
    diagonal_risks,
    divergence_step,
    fourth_moment,
    operator,
    risks,
    step,
)

from lightning_sgd import (
    LeastSquaresConstants,
    critical_batch_size,
    estimate_condition_numbers,
    least_squares_constants,
    max_learning_rate,
)
from lightning_sgd.functional.step_size.least_squares import constants_of_moments

SPECTRUM = 1 / np.arange(1.0, 51.0)


def gaussian(h, sigma=None):
    """Constants of Gaussian features with this diagonal covariance; noise of variance 0.01 unless given."""
    h = np.diag(h)
    sigma = 0.01 * h if sigma is None else np.diag(sigma)
    fourth = fourth_moment(h, np.eye(len(h)))
    return constants_of_moments(*(torch.from_numpy(each) for each in (h, fourth, sigma)))


def approximately(*values, digits=6):
    """Equal to so many digits."""
    return pytest.approx(values, abs=0.5001 * 10.0**-digits)


# By hand


def test_four_points():
    # ±e₁ and ±e₂ with residuals ±1: H = I/2, E[‖x‖²xxᵀ] = H, Σ = H.
    x = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    found = least_squares_constants(x, torch.tensor([1.0, -1.0, -1.0, 1.0]))
    assert (found.R2, found.norm_h, found.mu, found.rho_m, found.sigma2_mle, found.rank) == (
        approximately(1.0, 0.5, 0.5, 1.0, 2.0, 2, digits=12)
    )
    assert critical_batch_size(found) == pytest.approx(3)
    assert [max_learning_rate(found, b) for b in (1, 3)] == approximately(2.0, 3.0)
    assert found.kappa == pytest.approx(1)


def test_gaussian_features_with_a_spectrum_like_one_over_k():
    found = gaussian(SPECTRUM)
    values = found.R2, critical_batch_size(found), max_learning_rate(found, 1)
    assert values == approximately(6.4992053, 7.4992053, 0.3077299, digits=7)
    assert (found.rho_m, found.sigma2_mle, found.kappa) == approximately(1.0, 0.5, 50.0)
    steps = [max_learning_rate(found, b) / 2 for b in (1, 3, 8, 11, 22, 50)]
    assert steps == approximately(0.15386, 0.35297, 0.59263, 0.66670, 0.80002, 0.90091, digits=5)


LEMMA = (np.r_[1.0, np.full(19, 1 / 20)], np.r_[1.0, np.full(19, 1 / 380)])
"""Twenty dimensions in which the noise lies across the features."""


def test_a_misspecified_problem():
    found = gaussian(*LEMMA)
    assert (found.rho_m, found.R2) == approximately(10.0, 3.95)
    assert max_learning_rate(found, 1) == pytest.approx(0.0506329, abs=5e-8)
    assert max_learning_rate(found, 1, well_specified=True) == pytest.approx(2 / 3.95)
    assert critical_batch_size(found) == pytest.approx(1 + 39.5)
    assert critical_batch_size(found, well_specified=True) == pytest.approx(1 + 3.95)


def test_rho_from_samples():
    # Uniform over √(d·h_i)·e_i with residuals √(Σ_i/h_i): the moments of the lemma, but for the fourth one.
    h, sigma = LEMMA
    found = least_squares_constants(
        torch.from_numpy(np.diag(np.sqrt(len(h) * h))), torch.from_numpy(np.sqrt(sigma / h))
    )
    assert (found.rho_m, found.R2, found.rank) == approximately(10.0, 20.0, 20)
    assert found.sigma2_mle == pytest.approx((sigma / h).sum())


@pytest.mark.parametrize(
    ("num", "expected"), [(500, 1.96), (2000, 1.38), (10_000, 1.19), (50_000, 1.08)]
)
def test_few_samples_exaggerate_rho(num, expected):
    # Who trusts ρ from few samples takes steps that are far too small.
    generator = torch.Generator().manual_seed(0)
    scale = torch.from_numpy(SPECTRUM).sqrt()
    x = torch.randn(num, 50, generator=generator, dtype=torch.float64) * scale
    noise = 0.1 * torch.randn(num, generator=generator, dtype=torch.float64)
    found = least_squares_constants(x, noise)
    assert found.rho_m - 1 == pytest.approx(expected - 1, rel=0.3)
    assert pytest.approx(6.4992, rel=0.15) == found.R2
    assert found.norm_h == pytest.approx(1, rel=0.15)


# Against the exact recursion


@pytest.mark.parametrize("b", [1, 3, 8, 50])
def test_steps_are_stable_and_the_recursion_diverges_beyond_the_published_step(b):
    # γ_div = 2b / λmax((b + 1)·diag(h) + √h√hᵀ) is for the diagonal of Φ, the operator here for all of it.
    h = np.array([1.0, 0.8, 0.6, 0.5, 0.4])
    limit = divergence_step(np.diag(h), b)
    closed = 2 * b / np.linalg.eigvalsh((b + 1) * np.diag(h) + np.sqrt(np.outer(h, h))).max()
    assert limit == pytest.approx(closed, rel=1e-6)
    assert max_learning_rate(gaussian(h), b) <= limit
    radius = np.abs(np.linalg.eigvals(operator(np.diag(h), 1.001 * limit, b))).max()
    assert radius > 1


PUBLISHED = {1: 0.373081, 3: 0.915961, 8: 1.500504, 11: 1.633109, 22: 1.816531, 50: 1.919633}


def test_published_divergence_steps_are_above_ours_by_less_than_three_quarters():
    root = np.sqrt(np.outer(SPECTRUM, SPECTRUM))
    for b, published in PUBLISHED.items():
        limit = 2 * b / np.linalg.eigvalsh((b + 1) * np.diag(SPECTRUM) + root).max()
        assert limit == pytest.approx(published, abs=5e-7)
        assert 1 < limit / max_learning_rate(gaussian(SPECTRUM), b) < 1.75


TABLE = {
    1: (10_000, 8.849e-5, 7.706e-5, 2.910e-3),
    3: (3333, 1.474e-4, 6.799e-5, 2.064e-3),
    8: (1250, 4.644e-4, 5.804e-5, 1.202e-3),
    11: (909, 7.949e-4, 5.483e-5, 9.631e-4),
    22: (454, 2.853e-3, 5.100e-5, 5.581e-4),
    50: (200, 1.418e-2, 5.667e-4, 3.209e-4),
}
"""By batch size: steps for 10 000 samples, and the risk of the tail after 250 samples, after half, of the last step."""


@pytest.mark.parametrize("b", TABLE)
def test_risk_at_half_of_the_largest_step(b):
    # The table of the paper file, with the step of this package in the exact recursion.
    gamma = max_learning_rate(gaussian(SPECTRUM), b) / 2
    num_steps, early, half, last = TABLE[b]
    found = [
        diagonal_risks(SPECTRUM, 0.01 * SPECTRUM, np.ones(50), gamma, b, num_steps, start)
        for start in (250 // b, num_steps // 2)
    ]
    assert found[0][0] == pytest.approx(early, rel=1e-3)
    assert found[1][0] == pytest.approx(half, rel=1e-3)
    assert found[0][1] == pytest.approx(last, rel=1e-3)


def test_both_forms_of_the_recursion_are_the_same():
    h, settings = np.array([1.0, 0.5, 0.1]), (0.3, 4, 50, 20)
    full = risks(np.diag(h), np.diag(h) / 9, np.diag(h + 1), *settings)
    diagonal = diagonal_risks(h, h / 9, h + 1, *settings)
    assert diagonal[:2] == pytest.approx(full[:2], rel=1e-12)
    np.testing.assert_allclose(np.diag(full[2]), diagonal[2], rtol=1e-12)


def test_steps_to_a_target_stop_falling_at_the_critical_batch_size():
    # What the threshold is for: up to it b-fold batches save b-fold steps, far above it next to nothing.
    h, constants = np.diag(SPECTRUM), gaussian(SPECTRUM)

    def steps(b):
        gamma, phi = max_learning_rate(constants, b) / 2, np.ones((50, 50))
        for count in range(10_000):
            if np.trace(h @ phi) / 2 < 0.02:
                return count
            phi = step(phi, h, 0 * h, gamma, b)
        raise AssertionError

    threshold = round(critical_batch_size(constants))
    one, at, four_times, very_large = (steps(b) for b in (1, threshold, 4 * threshold, 10_000))
    assert one / at > threshold / 2
    assert at / four_times < 2
    assert at / very_large == pytest.approx(2, rel=0.1)


def test_five_dimensions():
    h = np.array([1.0, 0.8, 0.6, 0.5, 0.4])
    gamma = max_learning_rate(gaussian(h), 4) / 2
    assert gamma == pytest.approx(0.48192771, abs=5e-9)
    risk, *_ = risks(np.diag(h), 0.01 * np.diag(h), np.ones((5, 5)), gamma, 4, 60, 20)
    assert risk == pytest.approx(2.087114e-4, rel=1e-5)


def test_doubling_the_batch_at_its_own_step():
    h = np.array([1.0, 0.8, 0.65, 0.5])
    constants, phi, found = gaussian(h), np.ones((4, 4)), []
    assert pytest.approx(4.95) == constants.R2
    assert round(critical_batch_size(constants)) == 6
    for phase in range(6):
        b = 6 * 2**phase
        gamma = max_learning_rate(constants, b) / 2
        _, risk, phi = risks(np.diag(h), 0.01 * np.diag(h), phi, gamma, b, 34, 0)
        found.append(risk)
    expected = [1.2996e-3, 7.973e-4, 4.500e-4, 2.405e-4, 1.2459e-4, 6.344e-5]
    assert found == pytest.approx(expected, rel=2e-4)
    gamma = max_learning_rate(constants, 384) / 2
    risk, *_ = risks(np.diag(h), 0.01 * np.diag(h), phi, gamma, 384, 34, 17)
    assert risk == pytest.approx(2.9689e-6, rel=2e-4)


def test_noise_across_the_features_is_inflated_at_the_step_for_the_other_case():
    # 2·Tr(T⁻¹Σ)/Tr(H⁻¹Σ) with the operator of the recursion: what ρ protects from.
    h, sigma = (np.diag(each) for each in LEMMA)
    constants = gaussian(*LEMMA)

    def inflation(gamma, sigma):
        t = (np.eye(400) - operator(h, gamma, 1)) / gamma
        stationary = np.linalg.solve(t, sigma.ravel()).reshape(20, 20)
        return 2 * np.trace(stationary) / np.trace(np.linalg.solve(h, sigma))

    full = max_learning_rate(constants, 1, well_specified=True) / 2
    assert inflation(full, sigma) == pytest.approx(3.7302, abs=5e-5)
    assert inflation(full, h) == pytest.approx(1.4521, abs=5e-5)
    assert inflation(max_learning_rate(constants, 1) / 2, sigma) == pytest.approx(1.1537, abs=5e-5)


# Properties


@settings(deadline=None, max_examples=30)
@given(
    num=st.integers(1, 30),
    d=st.integers(1, 8),
    scale=st.floats(1e-3, 1e3),
    seed=st.integers(0, 10**6),
)
def test_properties(num, d, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num, d, generator=generator, dtype=torch.float64)
    r = torch.randn(num, generator=generator, dtype=torch.float64)
    found = least_squares_constants(x, r)
    turn = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64)).Q
    turned = least_squares_constants(scale * x @ turn, 3 * r)
    assert found.rank == min(num, d)
    assert found.rho_m >= 1 - 1e-9
    assert found.norm_h <= found.R2 * (1 + 1e-9)
    for name, factor in (("R2", scale**2), ("norm_h", scale**2), ("mu", scale**2)):
        assert getattr(turned, name) == pytest.approx(factor * getattr(found, name), rel=1e-6)
    assert (turned.rho_m, turned.sigma2_mle) == pytest.approx(
        (found.rho_m, 9 * found.sigma2_mle), rel=1e-6
    )
    assert critical_batch_size(turned) == pytest.approx(critical_batch_size(found), rel=1e-6)
    rates = [max_learning_rate(found, b) for b in (1, 2, 5, 100, 10**9)]
    assert all(a <= b * (1 + 1e-12) for a, b in itertools.pairwise(rates))
    assert rates[-1] == pytest.approx(2 / found.norm_h, rel=1e-5)
    threshold = critical_batch_size(found)
    at = 2 * threshold / (found.R2 * found.rho_m + (threshold - 1) * found.norm_h)
    assert at == pytest.approx(threshold * max_learning_rate(found, 1) / 2, rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kappa", [10.0, 1e3, 1e7])
def test_both_results_know_the_spectrum_that_the_features_were_made_with(kappa, dtype):
    # σ₃ of 3e-4·σ₁ is far above the rounding of float32, however small its square is.
    generator = np.random.default_rng(0)
    u, _ = np.linalg.qr(generator.standard_normal((200, 3)))
    v, _ = np.linalg.qr(generator.standard_normal((3, 3)))
    eigenvalues = np.array([1.0, kappa**-0.5, 1 / kappa])
    made = (u * np.sqrt(200 * eigenvalues)) @ v.T
    x = torch.from_numpy(made).to(dtype)
    lengths = (made**2).sum(axis=1)
    r2 = np.linalg.eigvalsh(u.T @ (lengths[:, None] * u))[-1]
    numbers = estimate_condition_numbers(x)
    found = least_squares_constants(x, torch.ones(200))
    # Rounding to float32 moves a singular value by 1e-7 of the largest at most.
    exact = 1e-8 if dtype == torch.float64 else 1e-3
    assert (numbers.L, numbers.mu, numbers.L1) == pytest.approx((1, 1 / kappa, r2), rel=exact)
    assert (found.norm_h, found.mu, found.R2) == (numbers.L, numbers.mu, numbers.L1)
    assert (found.rank, found.kappa) == (3, numbers.kappa)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_rounding_of_dependent_features_makes_no_direction(dtype):
    # Forty features that depend on five: what rounding leaves of the others is not taken for a small eigenvalue.
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(s, generator=generator, dtype=torch.float64) for s in ((300, 5), (5, 40))]
    x = (made[0] @ made[1]).to(dtype)
    found = least_squares_constants(x, torch.ones(300))
    assert found.rank == 5
    assert estimate_condition_numbers(x).mu == found.mu


def test_more_features_than_samples_and_no_noise():
    x = torch.randn(5, 2, 10, generator=torch.Generator().manual_seed(0))
    found = least_squares_constants(x, torch.zeros(5, 1))
    assert pytest.approx(float(x.flatten(1).square().sum(dim=1).max()), rel=1e-6) == found.R2
    assert (found.rho_m, found.sigma2_mle, found.rank) == (1.0, 0.0, 5)


@pytest.mark.parametrize(
    ("features", "residuals", "argument"),
    [
        (torch.ones(3, 2), torch.ones(2), "residuals"),
        (torch.ones(0, 2), torch.ones(0), "residuals"),
        (torch.zeros(3, 2), torch.ones(3), "features"),
        (torch.full((3, 2), torch.nan), torch.ones(3), "features and residuals"),
    ],
)
def test_bad_input_is_refused(features, residuals, argument):
    with pytest.raises(ValueError, match=f"Expected `{argument}` to be"):
        least_squares_constants(features, residuals)


def test_an_empty_batch_is_refused():
    with pytest.raises(ValueError, match="Expected `batch_size` to be at least 1, got 0"):
        max_learning_rate(LeastSquaresConstants(1.0, 1.0, 1.0, 1.0, 1.0, 1), 0)
