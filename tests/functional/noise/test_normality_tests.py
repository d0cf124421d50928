"""The three tests of normality against SciPy, NumPy transcriptions of their definitions, and printed numbers."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special, stats

from lightning_sgd import anderson_darling, jarque_bera, shapiro_wilk

TESTS = [shapiro_wilk, anderson_darling, jarque_bera]
EACH = pytest.mark.parametrize("test", TESTS, ids=lambda test: test.__name__)
SIZES = [3, 4, 5, 6, 7, 11, 12, 13, 50, 257, 5000]
LAWS = {
    "normal": lambda rng, shape: 3 + 2 * rng.standard_normal(shape),
    "Student": lambda rng, shape: rng.standard_t(3, shape),
    "ties": lambda rng, shape: rng.integers(0, 4, shape).astype(float),
    "exponential": lambda rng, shape: rng.exponential(size=shape),
}


def samples_of(law, num, rows=8):
    x = LAWS[law](np.random.default_rng(num), (rows, num))
    return x[np.ptp(x, axis=1) > 0]


def anderson_by_scipy(row):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # about the result object of old
        return stats.anderson(row).statistic


def w_by_definition(row):
    """Royston's weights with accurate quantiles, written down from the formulas of the paper, as in a textbook."""
    n = len(row)
    m = special.ndtri((np.arange(1, n + 1) - 3 / 8) / (n + 1 / 4))
    c, u = m / np.linalg.norm(m), n**-0.5
    a = np.zeros(n)
    last = np.polyval([-2.706056, 4.434685, -2.071190, -0.147981, 0.221157, c[-1]], u)
    before = np.polyval([-3.582633, 5.682633, -1.752461, -0.293762, 0.042981, c[-2]], u)
    phi = (m @ m - 2 * m[-1] ** 2 - 2 * m[-2] ** 2) / (1 - 2 * last**2 - 2 * before**2)
    a[2:-2] = m[2:-2] / np.sqrt(phi)
    a[[0, 1, -2, -1]] = -last, -before, before, last
    return (a @ np.sort(row)) ** 2 / ((row - row.mean()) ** 2).sum()


def p_by_stephens(adjusted):
    """The piecewise approximation as it is printed."""
    if adjusted >= 0.6:
        return math.exp(1.2937 - 5.709 * adjusted + 0.0186 * adjusted**2)
    if adjusted >= 0.34:
        return math.exp(0.9177 - 4.279 * adjusted - 1.38 * adjusted**2)
    if adjusted >= 0.2:
        return 1 - math.exp(-8.318 + 42.796 * adjusted - 59.938 * adjusted**2)
    return 1 - math.exp(-13.436 + 101.14 * adjusted - 223.73 * adjusted**2)


# Against SciPy and definitions


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("num", SIZES)
def test_shapiro_wilk_is_that_of_scipy(num, law):
    # SciPy's normal quantiles are good to nine digits, and its p-value follows them.
    x = samples_of(law, num)
    w, p = shapiro_wilk(torch.from_numpy(x))
    expected = [stats.shapiro(row) for row in x]
    np.testing.assert_allclose(w, [e.statistic for e in expected], rtol=0, atol=2e-8)
    np.testing.assert_allclose(p, [e.pvalue for e in expected], rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("num", [6, 12, 257, 5000])
def test_shapiro_wilk_is_its_definition_to_float64(num):
    x = samples_of("normal", num)
    w, p = shapiro_wilk(torch.from_numpy(x))
    by_definition = np.array([w_by_definition(row) for row in x])
    np.testing.assert_allclose(w, by_definition, rtol=1e-13)
    if num >= 12:
        log = math.log(num)
        mean = -1.5861 - 0.31082 * log - 0.083751 * log**2 + 0.0038915 * log**3
        spread = math.exp(-0.4803 - 0.082676 * log + 0.0030302 * log**2)
        z = (np.log1p(-by_definition) - mean) / spread
        np.testing.assert_allclose(p, stats.norm.sf(z), rtol=1e-7)


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("num", SIZES)
def test_anderson_darling_is_that_of_scipy(num, law):
    x = samples_of(law, num)
    statistic, p = anderson_darling(torch.from_numpy(x))
    expected = np.array([anderson_by_scipy(row) for row in x])
    np.testing.assert_allclose(statistic, expected, rtol=1e-9)
    adjusted = expected * (1 + 0.75 / num + 2.25 / num**2)
    printed = [p_by_stephens(value) for value in adjusted if value < 150]
    np.testing.assert_allclose(p[adjusted < 150], printed, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize(
    ("critical", "level"), [(0.561, 0.15), (0.631, 0.1), (0.752, 0.05), (0.873, 0.025)]
)
def test_the_approximation_meets_the_table_of_critical_values(critical, level):
    from lightning_sgd.functional.noise.normality_tests import _stephens

    assert _stephens(torch.tensor(critical)).item() == pytest.approx(level, rel=0.05)


def test_huge_distances_are_not_called_normal():
    # The printed parabola turns upwards at A* = 153 and would give 1 in the end.
    x = torch.cat([torch.zeros(4999), torch.ones(1)]).double()
    assert anderson_darling(x).p_value < 1e-100
    assert anderson_darling(x).statistic > 1000


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("num", SIZES)
def test_jarque_bera_is_that_of_scipy(num, law):
    x = samples_of(law, num)
    statistic, p = jarque_bera(torch.from_numpy(x))
    expected = [stats.jarque_bera(row) for row in x]
    np.testing.assert_allclose(statistic, [e.statistic for e in expected], rtol=1e-11, atol=1e-14)
    np.testing.assert_allclose(p, [e.pvalue for e in expected], rtol=1e-9, atol=1e-300)


def test_ten_and_twelve_numbers_in_order():
    # Printed numbers; ten samples need the other branch of the p-value, which would be 0.941 by that for twelve.
    w, p = shapiro_wilk(torch.arange(1.0, 11.0))
    assert (w.item(), p.item()) == pytest.approx((0.970165, 0.89237), abs=1e-5)
    x = torch.arange(1.0, 13.0)
    assert [value.item() for value in shapiro_wilk(x)] == pytest.approx(
        [0.9668964, 0.875731], abs=1e-6
    )
    assert [value.item() for value in anderson_darling(x)] == pytest.approx(
        [0.15302, 0.9415], abs=1e-4
    )
    assert jarque_bera(x).statistic.item() == pytest.approx(0.740281, abs=1e-6)


# Level and power


@EACH
@pytest.mark.parametrize("num", [50, 200])
def test_normal_samples_are_rejected_at_the_level(test, num):
    x = torch.randn(4000, num, generator=torch.Generator().manual_seed(0))
    for level in (0.05, 0.2):
        share = (test(x).p_value < level).double().mean().item()
        low = (0.4 if test is jarque_bera else 0.8) * level  # its p-value is that of the limit
        assert low < share < 1.2 * level


@pytest.mark.parametrize("law", ["Student", "Laplace", "two points"])
def test_others_are_rejected(law):
    rng = np.random.default_rng(0)
    draw = {
        "Student": lambda: rng.standard_t(3, (1000, 200)),
        "Laplace": lambda: rng.laplace(size=(1000, 200)),
        "two points": lambda: rng.choice([-1.0, 1.0], (1000, 200)),
    }[law]
    x = torch.from_numpy(draw())
    for test in (shapiro_wilk, anderson_darling):
        assert (test(x).p_value < 0.05).double().mean() > 0.9


# Invariances and shapes


@EACH
@settings(max_examples=40, deadline=None)
@given(
    num=st.integers(3, 60),
    seed=st.integers(0, 10**6),
    shift=st.floats(-1e3, 1e3),
    log_scale=st.floats(-20, 20),
    negative=st.booleans(),
)
def test_shift_scale_and_order_do_not_matter(test, num, seed, shift, log_scale, negative):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(num)
    moved = 10**log_scale * (-1 if negative else 1) * (rng.permutation(x) + shift)
    here, there = test(torch.from_numpy(x)), test(torch.from_numpy(moved))
    for a, b in zip(here, there, strict=True):
        assert b.item() == pytest.approx(a.item(), rel=1e-8, abs=1e-9)


@EACH
def test_rows_are_tested_one_by_one_along_any_dimension(test):
    x = torch.randn(2, 30, 5, generator=torch.Generator().manual_seed(0))
    statistic, p = test(x, dim=1)
    assert statistic.shape == p.shape == (2, 5)
    assert statistic.dtype == p.dtype == torch.float64
    for i in range(2):
        for j in range(5):
            assert test(x[i, :, j]).statistic.item() == pytest.approx(statistic[i, j].item())
    assert test(x[:, :0], dim=2).statistic.shape == (2, 0)


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_narrow_types_are_summed_in_float64(test, dtype):
    # Numbers that float32 holds, but whose sum of squares it does not.
    x = (100 + torch.randn(4, 3000, generator=torch.Generator().manual_seed(0))).to(dtype)
    narrow, wide = test(x), test(x.double())
    for a, b in zip(narrow, wide, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)
    assert not x.requires_grad


@EACH
@pytest.mark.parametrize("scale", [1e-310, 1e-200, 1e200, 1e307])
def test_extreme_scales_are_no_obstacle(test, scale):
    x = torch.randn(20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert test(scale * x).statistic.item() == pytest.approx(test(x).statistic.item(), rel=1e-6)


@EACH
def test_a_mean_far_away_costs_no_digits(test):
    # Multiples of 2^-10 around 2^42 are exact in float64; their sum is not.
    x = torch.randn(3000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = (x * 1024).round() / 1024
    for a, b in zip(test(x + 2.0**42), test(x), strict=True):
        assert a.item() == pytest.approx(b.item(), rel=1e-10)


@EACH
def test_constant_and_broken_rows_give_nan(test):
    # Dead units have constant projections; they must not stop the others.
    x = torch.randn(5, 20, generator=torch.Generator().manual_seed(0))
    x[0], x[1, 3], x[2, 4], x[3, 5] = 7.1, torch.nan, torch.inf, -torch.inf
    for values in test(x):
        assert values.isnan().tolist() == [True] * 4 + [False]


@EACH
def test_wrong_samples_are_refused(test):
    for x in (torch.ones(3, 2), torch.ones(0)):
        with pytest.raises(ValueError, match=r"Expected `samples` to be .*3.* values in each row"):
            test(x)
    with pytest.raises(ValueError, match=r"to be real numbers, got torch\.int64"):
        test(torch.arange(10))
    with pytest.raises(ValueError, match="of one dimension at least"):
        test(torch.tensor(1.0))


def test_the_p_value_of_shapiro_and_wilk_ends_at_5000():
    with pytest.raises(ValueError, match="3 to 5000 values in each row, got 5001"):
        shapiro_wilk(torch.ones(5001))
    assert anderson_darling(torch.randn(5001)).p_value > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@EACH
def test_a_gpu_gives_the_same(test):
    x = torch.randn(50, 256, generator=torch.Generator().manual_seed(0))
    for a, b in zip(test(x.cuda()), test(x), strict=True):
        assert a.device.type == "cuda"
        torch.testing.assert_close(a.cpu(), b, rtol=1e-10, atol=1e-12)
