"""Tail indices against hand-computed numbers, SciPy's stable law, and the closed forms of the known biases."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_sgd import dyadic_tail_index, log_moment_tail_index, sample_stable
from lightning_sgd.functional.noise.dyadic_ladder import pooled_sums, stream_sums
from lightning_sgd.functional.noise.tail_index import tail_index_of

ALPHAS = [0.8, 1.0, 1.2, 1.5, 1.8, 1.95, 2.0]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def stable(alpha, shape, seed=0):
    return sample_stable(alpha, shape, generator=generator(seed))


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def by_numpy(x, levels):
    """Mean ln|sum of 2^j| without zeros, and the number of sums, the long way."""
    x = np.asarray(x, dtype=np.float64)
    x = x[: len(x) >> levels << levels]
    sums = [x.reshape(-1, 2**j).sum(axis=1) for j in range(levels + 1)]
    return [(np.log(np.abs(s[s != 0])).mean(), (s != 0).sum()) for s in sums]


# The paper's estimator


def test_four_numbers_by_hand():
    # mean ln|Y| = (ln 3 + ln 7)/2 = 1.52226, mean ln|x| = 0.79451, over ln 2.
    result = log_moment_tail_index(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert 1 / result.alpha == pytest.approx(1.04992, abs=1e-5)
    assert result.alpha == pytest.approx(0.952455, abs=1e-6)


@pytest.mark.parametrize("length", [2, 3, 8, 60])
def test_constants_give_one_and_alternating_signs_give_infinity(length):
    assert log_moment_tail_index(torch.full((240,), 3.7), length).alpha == pytest.approx(1)
    if length % 2:
        x = torch.tensor([2.0, -2.0]).repeat(120)
        assert abs(1 / log_moment_tail_index(x, length).alpha) < 1e-12


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_the_scale_does_not_matter(scale):
    # The constant that other implementations add inside the logarithm makes 4.3 of 1.5 at small scales.
    x = stable(1.5, 4096)
    for estimate in (log_moment_tail_index, dyadic_tail_index):
        assert estimate(scale * x).alpha == pytest.approx(estimate(x).alpha, rel=1e-9)


def test_the_block_length_is_the_largest_divisor_up_to_the_root():
    x = stable(1.5, 1200)
    sqrt, thirty = log_moment_tail_index(x), log_moment_tail_index(x, 30)
    assert sqrt == thirty
    with pytest.raises(ValueError, match="Expected `block_length` to be between 2 and the 1201"):
        log_moment_tail_index(stable(1.5, 1201))
    assert log_moment_tail_index(stable(1.5, 1201), 30).num_samples == 1200


@pytest.mark.parametrize("alpha", ALPHAS)
def test_the_index_of_stable_samples_is_found(alpha):
    K, K1 = 2**18, 16
    x = stable(alpha, K)
    tolerance = 5 * alpha**2 * math.sqrt(math.pi**2 / 6 * (1 / alpha**2 + 0.5) * K1 / K)
    assert abs(log_moment_tail_index(x, K1).alpha - alpha) < tolerance / math.log(K1)
    result = dyadic_tail_index(x)
    assert abs(result.alpha - alpha) < 0.04
    assert result.verdict == ("stable" if alpha < 2 else "finite variance")


# The ladder


@settings(max_examples=30, deadline=None)
@given(
    cuts=st.lists(st.integers(0, 3000), max_size=5),
    levels=st.integers(1, 6),
    zeros=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_any_chunks_give_what_numpy_gives(cuts, levels, zeros, dtype):
    x = stable(1.3, 3000).to(dtype)
    if zeros:
        x[::3] = 0.0
    parts = torch.tensor_split(x, sorted(cuts))
    sums = stream_sums(parts, levels)
    expected = by_numpy(x, levels)
    assert sums.counts.tolist() == [count for _, count in expected]
    means = [mean for mean, _ in expected]
    np.testing.assert_allclose(sums.log_sums / sums.counts, means, rtol=1e-9, atol=1e-9)
    whole, rest = pooled_sums(x, levels)
    assert torch.equal(whole.counts, sums.counts)
    torch.testing.assert_close(whole.products, sums.products)
    assert int(sums.num_zeros) == int((x[: len(x) - len(rest)] == 0).sum())


def test_the_slope_is_numpys_weighted_least_squares():
    x = stable(1.3, 4096)
    means, counts = zip(*by_numpy(x, 8), strict=True)
    slope, _ = np.polyfit(np.arange(9) * np.log(2), means, 1, w=np.sqrt(counts))
    result = dyadic_tail_index(x)
    assert result.alpha == pytest.approx(1 / slope, rel=1e-9)
    local = np.log(2) / np.diff(means)
    np.testing.assert_allclose(result.profile, local, rtol=1e-9)


@pytest.mark.parametrize("scale", [1e-300, 1e-30, 1e30, 1e300])
def test_products_of_magnitudes_may_leave_the_range(scale):
    # They are multiplied before the logarithm is taken; a product of sixteen would be 0 or infinite.
    x = stable(1.8, 4096)
    assert dyadic_tail_index(x * scale).alpha == pytest.approx(dyadic_tail_index(x).alpha, rel=1e-6)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("alpha", [0.8, 1.2, 1.5, 1.8, 2.0])
def test_the_stated_error_covers_the_truth(alpha):
    # 200 seeds: 95 % within 1.96 standard errors, give or take.
    rows = stable(alpha, (200, 2**14), seed=7)
    for estimate in (dyadic_tail_index, lambda x: log_moment_tail_index(x, 8)):
        found = [estimate(row) for row in rows]
        inside = [abs(r.alpha - alpha) < 1.96 * r.standard_error for r in found]
        assert 0.90 <= np.mean(inside) <= 0.99
        ratio = np.mean([r.standard_error for r in found]) / np.std([r.alpha for r in found])
        assert 0.85 < ratio < 1.15


def test_the_error_allows_for_dependence_within_blocks():
    # Every sample sixteen times over: sixteen times fewer samples, whatever their number says.
    x = normal(200, 2**10)
    errors = [dyadic_tail_index(row.repeat_interleave(16), levels=8) for row in x]
    spread = np.std([r.alpha for r in errors])
    assert np.mean([r.standard_error for r in errors]) == pytest.approx(spread, rel=0.15)


def test_every_column_is_a_sequence_of_its_own():
    # Scales between columns differ by thousands, and half of the columns are dead.
    x = stable(1.5, (64, 4000)) * normal(4000, seed=1).mul(3).exp()
    x[:, ::2] = 0.0
    result = dyadic_tail_index(x, dim=0)
    assert result.alpha == pytest.approx(1.5, abs=0.02)
    assert result.zero_fraction == 0.5
    by_hand = []
    for column in x[:, 1::2].T.numpy():
        means, _ = zip(*by_numpy(column, 3), strict=True)
        counts = [8, 4, 2, 1]
        by_hand.append(np.polyfit(np.arange(4), means, 1, w=np.sqrt(counts))[0] / np.log(2))
    assert result.alpha == pytest.approx(1 / np.mean(by_hand), rel=1e-9)


# What the number cannot tell, in closed form


@pytest.mark.parametrize(("s", "expected"), [(1.0, 1.865), (2.0, 1.551), (3.0, 1.211)])
def test_gaussian_samples_of_unequal_scales_look_heavy(s, expected):
    # Variances log-normal with log-sd s: α = 2/(1 + (s²/2)/ln K₁).
    K1 = 1000
    x = normal(10**6) * (normal(10**6, seed=1) * s / 2).exp()
    assert expected == pytest.approx(2 / (1 + s**2 / 2 / math.log(K1)), abs=1e-3)
    assert log_moment_tail_index(x, K1).alpha == pytest.approx(expected, rel=0.03)
    assert dyadic_tail_index(x, levels=4).verdict != "stable"


@pytest.mark.parametrize(("rho", "expected"), [(0.01, 1.485), (0.1, 1.199), (1.0, 1.0)])
def test_correlated_samples_look_like_index_one(rho, expected):
    K1 = 1000
    common = normal(1000, 1, seed=1)
    x = math.sqrt(1 - rho) * normal(1000, K1) + math.sqrt(rho) * common
    closed = 2 / (1 + math.log(1 + (K1 - 1) * rho) / math.log(K1))
    assert expected == pytest.approx(closed, abs=1e-3)
    assert log_moment_tail_index(x, K1).alpha == pytest.approx(expected, rel=0.03)
    assert dyadic_tail_index(x.flatten()).verdict != "finite variance"


@pytest.mark.parametrize(("M", "expected"), [(16, 2.84), (64, 2.12)])
def test_centring_by_the_mean_of_the_same_batches_looks_light(M, expected):
    # 1/α = ½ + ½ ln[(1 − 1/K₂)/(1 − 1/M)]/ln K₁ for K₁ = 8; differences of pairs remove it.
    x = normal(M, 20_000)
    K2 = M // 8
    closed = 2 / (1 + math.log((1 - 1 / K2) / (1 - 1 / M)) / math.log(8))
    assert expected == pytest.approx(closed, abs=0.04)
    centred = (x - x.mean(0)).T.reshape(-1)
    assert log_moment_tail_index(centred, 8).alpha == pytest.approx(expected, rel=0.03)
    differences = x[1::2] - x[::2]
    assert dyadic_tail_index(differences, dim=0).alpha == pytest.approx(2, rel=0.03)


def test_sparse_samples_look_light():
    # Half zeros: of the sums of two that do not vanish a third has variance 2, so 1/α = (½ ln 2 / 3) / ln 2.
    x = normal(10**6) * (torch.rand(10**6, generator=generator(1)) < 0.5)
    assert dyadic_tail_index(x).profile[0] == pytest.approx(6, rel=0.03)


def test_heavy_but_not_stable_is_not_called_stable():
    rng = np.random.default_rng(0)
    laws = {
        "undecided": [rng.standard_t(1.5, 2**20)],
        "finite variance": [rng.standard_t(3, 2**20), rng.laplace(size=2**20)],
    }
    for verdict, samples in laws.items():
        for x in samples:
            assert dyadic_tail_index(torch.tensor(x)).verdict == verdict


def test_bounded_samples_give_more_than_two():
    assert log_moment_tail_index(torch.rand(10**5, generator=generator()) - 0.5, 8).alpha > 2.05


def test_missing_zero_and_broken_samples_have_values():
    # A monitor must not stop a run.
    assert math.isnan(dyadic_tail_index(torch.zeros(512)).alpha)
    assert math.isnan(dyadic_tail_index(torch.zeros(64, 3), dim=0).alpha)
    broken = normal(512)
    broken[7] = math.nan
    assert math.isnan(dyadic_tail_index(broken).alpha)
    assert math.isnan(tail_index_of(stream_sums([], 3)).alpha)
    with pytest.raises(ValueError, match=r"Expected `levels` to be at least 1, and 2\^levels"):
        dyadic_tail_index(normal(7), levels=3)
