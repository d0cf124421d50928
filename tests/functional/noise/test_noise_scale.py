"""The estimates of noise and signal: by hand, without a bias, with the stated error; the interval by its inequality."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_sgd.functional.noise.noise_scale import (
    GradientNoise,
    gradient_noise,
    noise_scale,
    steps_ratio,
    total_noise,
)


def draw(m, generator, mean, deviations, b):
    """Gradients of batches of b."""
    noise = torch.randn(m, len(mean), generator=generator, dtype=torch.float64)
    return mean + noise * deviations / math.sqrt(b)


MEAN = torch.linspace(-1, 1, 20, dtype=torch.float64)
DEVIATIONS = torch.linspace(0.5, 4, 20, dtype=torch.float64)
TRACE, SQUARE = float(DEVIATIONS.square().sum()), float(MEAN.square().sum())


def test_by_hand():
    # g = (2, 0), (0, 2), (2, 2): mean of products (0 + 4 + 4)/3, mean square (4 + 4 + 8)/3.
    found = gradient_noise(torch.tensor([[2.0, 0.0], [0.0, 2.0], [2.0, 2.0]]), batch_size=3)
    assert (found.gradient_sq, found.trace) == pytest.approx((8 / 3, 3 * (16 / 3 - 8 / 3)))
    # Without one row: products 4, 4, 0 and half the squared distances 2, 2, 4.
    expected = 2 / 3 * np.cov([[6.0, 6.0, 12.0], [4.0, 4.0, 0.0]], ddof=0) * 3
    assert found.var_trace == pytest.approx(expected[0, 0])
    assert found.var_gradient_sq == pytest.approx(expected[1, 1])
    assert found.covariance == pytest.approx(expected[0, 1])


def test_it_is_the_estimate_from_a_small_and_a_large_batch():
    rows = torch.randn(8, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = gradient_noise(rows, batch_size=4)
    small, large = float(rows.square().sum(dim=1).mean()), float(rows.mean(dim=0).square().sum())
    # Two equations: ‖G‖² + Tr Σ/4 = small and ‖G‖² + Tr Σ/32 = large.
    square, trace = np.linalg.solve([[1, 1 / 4], [1, 1 / 32]], [small, large])
    assert (found.gradient_sq, found.trace) == pytest.approx((square, trace))


@pytest.mark.parametrize("m", [2, 3, 16])
def test_estimates_have_no_bias(m):
    generator, num = torch.Generator().manual_seed(0), 3000
    looks = [gradient_noise(draw(m, generator, MEAN, DEVIATIONS, 8), 8) for _ in range(num)]
    for name, exact in (("trace", TRACE), ("gradient_sq", SQUARE)):
        values = np.array([getattr(look, name) for look in looks])
        assert abs(values.mean() - exact) < 4 * values.std() / num**0.5
        if m > 2:
            # The jackknife is a little too large on average, as it must be, and more so for few rows.
            claimed = np.mean([getattr(look, f"var_{name}") for look in looks])
            assert values.var() * 0.9 < claimed < values.var() * {3: 2.5, 16: 1.25}[m]


@pytest.mark.slow
@pytest.mark.parametrize(("m", "num_looks"), [(32, 1), (16, 8), (4, 30), (2, 60)])
def test_the_interval_holds_the_truth_as_often_as_it_says(m, num_looks):
    generator, num, hits = torch.Generator().manual_seed(1), 300, 0
    for _ in range(num):
        looks = [draw(m, generator, MEAN, DEVIATIONS, 8) for _ in range(num_looks)]
        found = noise_scale(total_noise([gradient_noise(rows, 8) for rows in looks]))
        hits += found.low <= TRACE / SQUARE <= found.high
    # For few rows the jackknife errs on the safe side.
    assert 0.89 <= hits / num <= (1.0 if m == 4 else 0.99)


@given(
    s=st.floats(0.1, 10),
    g=st.floats(-3, 3),
    errors=st.tuples(st.floats(0.01, 3), st.floats(0.01, 3), st.floats(-0.99, 0.99)),
)
def test_the_interval_is_what_the_inequality_says(s, g, errors):
    a, b, correlation = errors
    noise = GradientNoise(s, g, a**2, b**2, correlation * a * b, 10**9)
    found = noise_scale(noise)
    assert found.low >= 0
    for theta in np.r_[np.geomspace(1e-3, 1e3, 200), 1e9]:
        gap = (s - theta * g) ** 2 - 4 * (a**2 - 2 * theta * correlation * a * b + (theta * b) ** 2)
        holds = gap <= 0
        inside = found.low <= theta <= found.high
        edge = abs(gap) < 1e-6 * (1 + theta**2)
        # An interval may hold more than the set, which can be two half-lines, but never less.
        assert inside or not holds or edge
        if found.high < math.inf:
            assert holds or not inside or edge


@settings(deadline=None)
@given(scale=st.floats(1e-3, 1e3), b=st.integers(1, 100))
def test_units(scale, b):
    generator = torch.Generator().manual_seed(0)
    rows = draw(8, generator, MEAN, DEVIATIONS, 8)
    one, other = gradient_noise(rows, 1), gradient_noise(scale * rows, b)
    assert other.gradient_sq == pytest.approx(scale**2 * one.gradient_sq, rel=1e-9)
    assert other.trace == pytest.approx(b * scale**2 * one.trace, rel=1e-9)
    values = noise_scale(one), noise_scale(other)
    assert values[1].value == pytest.approx(b * values[0].value, rel=1e-9)
    assert values[1].low == pytest.approx(b * values[0].low, rel=1e-6)


def test_a_gradient_that_cannot_be_seen_has_no_upper_end():
    generator = torch.Generator().manual_seed(0)
    found = noise_scale(gradient_noise(draw(32, generator, 0 * MEAN, DEVIATIONS, 8), 8))
    assert found.high == math.inf
    assert 0 < found.low < found.value
    # Two gradients at one point say nothing about their own error.
    alone = noise_scale(gradient_noise(torch.tensor([[1.0, 0.0], [1.0, 1.0]]), 1))
    assert (alone.value, alone.low, alone.high) == (0.5, 0.0, math.inf)
    nothing = noise_scale(gradient_noise(torch.zeros(4, 3), 1))
    assert math.isnan(nothing.value)
    exact = noise_scale(gradient_noise(torch.ones(4, 3), 1))
    assert (exact.value, exact.low, exact.high) == (0, 0, 0)


def test_steps_are_those_of_the_quadratic_model():
    # One step on ½w² from w = 1 with a gradient 1 + noise/√B: the best step gains ½/(1 + scale/B).
    scale = 30.0

    def gain(b):
        steps = np.linspace(0, 1, 100_001)
        return (0.5 - 0.5 * ((1 - steps) ** 2 + steps**2 * scale / b)).max()

    for new in (1, 16, 1000):
        assert steps_ratio(scale, 16, new) == pytest.approx(gain(16) / gain(new), rel=1e-6)
    assert steps_ratio(math.inf, 16, 32) == 0.5


def test_a_single_gradient_is_refused():
    with pytest.raises(ValueError, match="Expected `rows` to be of two gradients or more"):
        gradient_noise(torch.ones(1, 3), 1)
