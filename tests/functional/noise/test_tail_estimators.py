"""Other tail estimators against SciPy's stable law and exact power laws, and the sampler against SciPy's law."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from lightning_sgd import (
    dedh_tail_index,
    ecf_tail_index,
    hill_tail_index,
    mcculloch_tail_index,
    pickands_tail_index,
    sample_stable,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def stable(alpha, shape, seed=0):
    return sample_stable(alpha, shape, generator=generator(seed))


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


@pytest.mark.parametrize("alpha", [0.8, 1.0, 1.2, 1.5, 1.8, 2.0])
def test_quantiles_and_characteristic_function(alpha):
    x = stable(alpha, 2**20, seed=3)
    assert ecf_tail_index(x) == pytest.approx(alpha, abs=0.01)
    assert mcculloch_tail_index(x) == pytest.approx(alpha, abs=0.03)


@pytest.mark.parametrize("alpha", [0.8, 1.25, 1.7])
def test_mccullochs_table_is_scipys(alpha):
    q75, q95 = stats.levy_stable.ppf([0.75, 0.95], alpha, 0)
    shares, values = [0, 0.05, 0.25, 0.75, 0.95, 1], [-99, -q95, -q75, q75, q95, 99]
    x = np.interp(np.linspace(0, 1, 201), shares, values)
    assert mcculloch_tail_index(torch.tensor(x)) == pytest.approx(alpha, abs=0.01)


def test_largest_samples_of_a_pareto_law():
    # On an exact power law all three are consistent, and Hill is the maximum-likelihood estimate.
    x = torch.tensor(np.random.default_rng(0).pareto(1.5, 10**6) + 1)
    logs = np.sort(np.log(x.numpy()))[::-1]
    assert hill_tail_index(x, 10**5) == pytest.approx(1 / (logs[: 10**5].mean() - logs[10**5]))
    for estimate in (hill_tail_index, pickands_tail_index, dedh_tail_index):
        assert estimate(x, 10**5) == pytest.approx(1.5, abs=0.05)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_samples_that_are_not_finite_give_no_number(value):
    x = normal(100)
    x[7] = value
    for estimate in (hill_tail_index, pickands_tail_index, dedh_tail_index):
        assert math.isnan(estimate(x, 2))
    assert math.isnan(mcculloch_tail_index(x))
    assert math.isnan(ecf_tail_index(x))


def test_ties_and_equal_spacings_do_not_divide_by_zero():
    equal = torch.ones(8)
    assert hill_tail_index(equal, 3) == math.inf
    assert dedh_tail_index(equal, 3) == 0.0  # γ = −∞: the tail ends there
    assert math.isnan(pickands_tail_index(equal, 2))
    assert math.isnan(pickands_tail_index(torch.tensor([2.0, 2.0, 1.0, 0.5]), 1))
    assert pickands_tail_index(torch.tensor([3.0, 2.0, 1.5, 1.0]), 1) == math.inf


def test_largest_samples_say_nothing_about_gaussian_ones():
    x = normal(10**6)
    assert hill_tail_index(x, 10**4) > 5
    assert pickands_tail_index(x, 10**4) < 0 or pickands_tail_index(x, 10**4) > 5
    assert hill_tail_index(stable(1.8, 10**6), 10**5) == pytest.approx(2.81, abs=0.05)


# The sampler


@pytest.mark.parametrize("alpha", [0.8, 1.0, 1.5, 2.0])
def test_samples_are_of_scipys_law(alpha):
    x = stable(alpha, 2000, seed=5).numpy() * 2.0
    assert stats.kstest(x, stats.levy_stable(alpha, 0, scale=2.0).cdf).pvalue > 0.01


def test_the_generator_decides_on_the_samples():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    assert torch.equal(stable(1.5, (3, 4)), stable(1.5, (3, 4)))
    assert torch.equal(torch.get_rng_state(), state)
    assert stable(2.0, 10**6).var() == pytest.approx(2.0, rel=0.01)
    for settings_ in ({"alpha": 0.0}, {"alpha": 2.1}, {"alpha": 1.0, "scale": 0.0}):
        with pytest.raises(ValueError, match=r"Expected `(alpha|scale)` to be"):
            sample_stable(**settings_, shape=3)
    for dtype in (torch.int64, torch.complex64):
        with pytest.raises(ValueError, match="Expected `dtype` to be a floating-point type"):
            sample_stable(1.5, 3, dtype=dtype)
