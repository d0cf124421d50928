"""Hyper-parameters and batch-size regimes against the closed forms and tables of the paper."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lightning_sgd import batch_size_regime, critical_batch_sizes, mass_hyperparameters

# Gaussian data in 128 dimensions with these eigenvalues: L1 = tr(H) + 2L and κ̃ = d + 2.
EIGENVALUES = np.maximum(0.7 ** np.arange(128), 1e-3)
SPECTRUM = {"L": 1.0, "L1": EIGENVALUES.sum() + 2.0, "mu": 1e-3, "kappa_tilde": 130.0}


def test_the_spectrum_of_the_gaussian_example():
    assert SPECTRUM["L1"] == pytest.approx(5.4387, abs=5e-5)


def test_full_batch_limit_is_deterministic_nesterov():
    best = mass_hyperparameters(L=2.0, L1=50.0, mu=0.02, kappa_tilde=300.0, batch_size=10**12)
    root = math.sqrt(2.0 / 0.02)
    assert best.eta1 == pytest.approx(0.5, rel=1e-8)
    assert best.eta2 == pytest.approx(0.0, abs=1e-9)
    assert best.gamma == pytest.approx((root - 1) / (root + 1), rel=1e-8)


def test_gaussian_example_in_three_dimensions():
    best = mass_hyperparameters(L=1.0, L1=4 + 2.0**-10, mu=2.0**-10, kappa_tilde=5.0, batch_size=1)
    assert (best.eta1, best.eta2, best.gamma) == pytest.approx(
        (0.24993898, 0.19856385, 0.98612324), abs=5e-9
    )


@pytest.mark.parametrize(
    ("batch_size", "steps", "steps_of_sgd"),
    [
        (1, 840.8, 5438.7),
        (2, 459.2, 3219.3),
        (8, 163.2, 1554.8),
        (64, 56.8, 1069.4),
        (512, 35.5, None),
    ],
)
def test_numbers_of_steps_of_the_gaussian_example(batch_size, steps, steps_of_sgd):
    best = mass_hyperparameters(**SPECTRUM, batch_size=batch_size)
    assert 1 / best.alpha == pytest.approx(steps, abs=0.06)
    if steps_of_sgd is not None:
        assert best.kappa_m == pytest.approx(steps_of_sgd, abs=0.06)


def test_steps_fall_with_slope_one_then_a_half_then_not_at_all():
    # 1/α over doublings of the batch size; between the two critical sizes the slope crosses ½.
    sizes = 2 ** np.arange(16)
    steps = [1 / mass_hyperparameters(**SPECTRUM, batch_size=int(m)).alpha for m in sizes]
    slopes = -np.diff(np.log2(steps))
    first, second = critical_batch_sizes(SPECTRUM["L"], SPECTRUM["L1"], SPECTRUM["kappa_tilde"])
    assert slopes[0] == pytest.approx(0.87, abs=0.005)
    assert slopes[-1] < 0.01
    between = slopes[(sizes[:-1] > first) & (2 * sizes[:-1] < second)]
    assert between.min() < 0.5 < between.max()
    assert np.all(np.diff(slopes) < 0)


def test_critical_sizes_are_ordered_whichever_saturates_first():
    assert critical_batch_sizes(L=1, L1=5.4387, kappa_tilde=130) == (5.4387, 130)
    assert critical_batch_sizes(L=2.0, L1=100.0, kappa_tilde=7.0) == (7.0, 50.0)


def test_regimes_begin_at_the_critical_sizes():
    sizes = [1, 5, 6, 129, 130, 10_000]
    assert [batch_size_regime(m, L=1.0, L1=5.4387, kappa_tilde=130.0) for m in sizes] == [
        "linear",
        "linear",
        "diminishing",
        "diminishing",
        "saturation",
        "saturation",
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"L": 0.0}, r"Expected `L` to be a positive number, got 0\.0\."),
        ({"L1": 0.5}, r"Expected `L1` to be at least L = 1, got 0\.5\."),
        ({"mu": 0.0}, r"Expected `mu` to be in \(0, L\] = \(0, 1\], got 0\.0\."),
        ({"mu": 2.0}, r"Expected `mu` to be in \(0, L\]"),
        ({"kappa_tilde": float("nan")}, r"Expected `kappa_tilde` to be at least 1, got nan\."),
        ({"batch_size": 0}, r"Expected `batch_size` to be at least 1, got 0\."),
    ],
)
def test_inconsistent_spectra_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        mass_hyperparameters(**{**SPECTRUM, "batch_size": 1, **change})


def test_regime_refuses_an_empty_batch():
    with pytest.raises(ValueError, match="Expected `batch_size` to be at least 1, got 0"):
        batch_size_regime(0, L=1.0, L1=2.0, kappa_tilde=3.0)
