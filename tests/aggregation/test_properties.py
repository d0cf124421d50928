"""What holds for any rows: symmetries, convexity, robustness, and where they end."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lightning_sgd.aggregation import CenteredClipping, SpectralFilter, get_aggregator
from lightning_sgd.aggregation.composition import RULES
from lightning_sgd.functional.robust.spectral_filter import largest_spread, spectral_filter

NAMES = [*RULES, "nnm+trmean", "nnm+median", "nnm+multikrum", "arc+nnm+filter"]
EVERY_RULE = pytest.mark.parametrize("name", NAMES)
ROBUST = [name for name in NAMES if name not in {"mean", "cclip", "rfa", "dnc"}]
SHIFTS_NOT = {"cge", "cclip", "rfa", "arc+nnm+filter"}  # they look at norms, or start from zero
SCALES_NOT = {"rfa"}  # its smoothing is a length
TIES = {
    "bulyan",
    "nnm+multikrum",
}  # nearest neighbours of each other, and equal mixed rows: the lower number wins
COORDINATES = {"mean", "median", "trmean", "meamed", "phocas", "bulyan", "nnm+trmean", "nnm+median"}

quickly = settings(max_examples=12, deadline=None, derandomize=True)
seeds = st.integers(0, 2**31)


def build(name, f):
    return get_aggregator(name, f)


@st.composite
def problems(draw, attacked=True):
    """Rows of honest and faulty workers, mixed, and how many are faulty; every rule is defined for them."""
    f = draw(st.integers(1, 2))
    n = draw(st.integers(4 * f + 3, 13))
    d = draw(st.sampled_from([2, 3, 17, 64]))
    rng = np.random.default_rng(draw(seeds))
    rows = rng.normal(size=(n, d)) * 10 ** rng.uniform(-1, 1, size=d)
    if attacked:
        rows[:f] = rows[f:].mean(axis=0) + rng.normal(size=d) * draw(st.sampled_from([0.1, 3, 50]))
    return torch.from_numpy(rng.permutation(rows)), f


def close(a, b, scale):
    torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-7 * float(scale))


@pytest.mark.parametrize("name", [name for name in NAMES if name not in TIES])
@quickly
@given(problems(attacked=False), seeds)
def test_the_order_of_the_rows_does_not_matter(name, problem, seed):
    rows, f = problem
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    if name == "monna":
        order = torch.cat([torch.tensor([0]), order[order != 0]])
    close(build(name, f)(rows[order]), build(name, f)(rows), rows.abs().max())


@pytest.mark.parametrize("name", [name for name in NAMES if name not in SHIFTS_NOT])
@quickly
@given(problems(), seeds)
def test_a_shift_of_all_rows_shifts_the_result(name, problem, seed):
    rows, f = problem
    # Not so far that a distant row would then count as one of the others: a row is dropped by its norm.
    shift = torch.randn(rows.shape[1], generator=torch.Generator().manual_seed(seed)).double()
    close(build(name, f)(rows + shift), build(name, f)(rows) + shift, rows.abs().max() + 3)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in SCALES_NOT])
@quickly
@given(problems(), st.sampled_from([1e-20, 1e-3, 7.0, 2.0**40]))
def test_a_scale_of_all_rows_scales_the_result(name, problem, scale):
    rows, f = problem
    close(build(name, f)(scale * rows), scale * build(name, f)(rows), scale * rows.abs().max())


@EVERY_RULE
@quickly
@given(problems(attacked=False), seeds)
def test_only_geometric_rules_turn_with_the_rows(name, problem, seed):
    rows, f = problem
    assume(rows.shape[1] > 1)
    generator = torch.Generator().manual_seed(seed)
    d = rows.shape[1]
    q = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64)).Q
    turned, result = build(name, f)(rows @ q), build(name, f)(rows) @ q
    if name not in COORDINATES or name == "mean":
        close(turned, result, rows.norm(dim=1).max())


def test_the_median_does_not_turn_with_the_rows():
    rows = torch.tensor([[0.0, 0.0], [1.0, 2.0], [3.0, 1.0]])
    q = torch.tensor([[0.6, -0.8], [0.8, 0.6]])
    rule = build("median", 1)
    assert not torch.allclose(rule(rows @ q), rule(rows) @ q, atol=0.1)


@EVERY_RULE
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_rows_give_that_row(name, dtype):
    row = torch.randn(1000, generator=torch.Generator().manual_seed(0), dtype=dtype)
    result = build(name, 2)(row.expand(11, -1))
    if name == "rfa":  # starts at zero and takes three steps
        torch.testing.assert_close(result, row, rtol=1e-4, atol=1e-4)
    else:
        torch.testing.assert_close(result, row, rtol=8 * torch.finfo(dtype).eps, atol=1e-12)


BAD = {
    "far": lambda row: 100 * row,
    "opposite": lambda row: -row,
    "near": lambda row: row * 1.01,
    "huge": lambda row: torch.full_like(row, 1e30),
    "overflow": lambda row: torch.full_like(row, 3e38),
    "zero": torch.zeros_like,
    "nan": lambda row: torch.full_like(row, torch.nan),
    "inf": lambda row: torch.full_like(row, torch.inf),
    "one nan": lambda row: torch.cat([torch.tensor([torch.nan], dtype=row.dtype), row[1:]]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ROBUST)
def test_a_majority_of_equal_rows_is_not_moved(name, dtype):
    row = torch.randn(1000, generator=torch.Generator().manual_seed(0), dtype=dtype) + 1
    rule = build(name, 2)
    for bad in itertools.combinations_with_replacement(BAD, 2):
        if name in {"cge", "arc+nnm+filter"} and {"opposite", "zero"}.intersection(bad):
            continue  # by design they believe the shorter rows, or make the longer ones shorter
        rows = [row] * 9
        rows[2:2], rows[7:7] = [BAD[bad[0]](row)], [BAD[bad[1]](row)]
        torch.testing.assert_close(
            rule(rows), row, rtol=8 * torch.finfo(dtype).eps, atol=1e-12, msg=f"{bad}"
        )


@pytest.mark.parametrize(
    "name", ["filter", "caf", "trmean", "meamed", "phocas", "nnm+mean", "multikrum", "mda"]
)
@quickly
@given(problems())
def test_without_faulty_workers_it_is_the_mean(name, problem):
    rows, _ = problem
    close(build(name, 0)(rows), rows.mean(dim=0), rows.abs().max())


@pytest.mark.parametrize("name", [name for name in NAMES if name not in COORDINATES | {"cclip"}])
@quickly
@given(problems())
def test_weights_are_shares(name, problem):
    rows, f = problem
    rule = build(name, f)
    result = rule(rows)
    weights = rule.report.weights
    assert float(weights.min()) >= 0
    assert float(weights.sum()) == pytest.approx(1.0) or "arc" in name
    close(weights @ rows, result, rows.abs().max())


def kappa(name, n, f):
    """Bounds of the (f, κ)-robustness of each rule, by Allouah et al. (2023)."""
    r = f / (n - 2 * f)
    bounds = {
        "krum": 6 * (1 + r),
        "geomed": 4 * (1 + r) ** 2,
        "trmean": 6 * r * (1 + r),
        "median": 4 * (1 + r) ** 2,
    }
    inner = bounds[name.removeprefix("nnm+")]
    return 8 * f / (n - f) * (inner + 1) if name.startswith("nnm+") else inner


@pytest.mark.parametrize(
    "name",
    ["krum", "geomed", "trmean", "median", "nnm+krum", "nnm+geomed", "nnm+trmean", "nnm+median"],
)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(problems())
def test_the_error_is_bounded_by_the_spread_of_any_honest_subset(name, problem):
    rows, f = problem
    n, result = len(rows), build(name, f)(rows)
    for subset in itertools.combinations(range(n), n - f):
        honest = rows[list(subset)]
        centre = honest.mean(dim=0)
        variance = (honest - centre).square().sum(dim=1).mean()
        error = (result - centre).square().sum()
        assert error <= kappa(name, n, f) * variance * (1 + 1e-9)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(problems(), st.sampled_from(["noise_floor", "agnostic"]))
def test_the_filter_keeps_the_resilience_lemma(problem, stop):
    rows, f = problem
    rule = SpectralFilter(f, stop=stop)
    result = rule(rows)
    p = rule.report.weights
    for subset in itertools.combinations(range(len(rows)), len(rows) - f):
        q = torch.zeros_like(p)
        q[list(subset)] = 1 / len(subset)
        delta = float((p - q).abs().sum()) / 2
        centred = rows - q @ rows
        spread = float(torch.linalg.eigvalsh(centred.mT @ (q[:, None] * centred))[-1])
        bound = (rule.report.top_eigenvalue**0.5 + spread**0.5) * (delta / (1 - delta)) ** 0.5
        assert float((result - q @ rows).norm()) <= bound * (1 + 1e-7) + 1e-12


@settings(max_examples=40, deadline=None, derandomize=True)
@given(problems(), seeds)
def test_projections_are_those_of_the_explicit_covariance(problem, seed):
    rows, _ = problem
    rng = np.random.default_rng(seed)
    p = torch.from_numpy(rng.dirichlet(np.ones(len(rows))))
    p[0] = 0
    p = p / p.sum()
    spread = largest_spread(rows @ rows.mT, p)
    centred = rows - p @ rows
    values, vectors = torch.linalg.eigh(centred.mT @ (p[:, None] * centred))
    assert spread.top_eigenvalue == pytest.approx(float(values[-1]), rel=1e-9)
    tau = torch.where(p > 0, (centred @ vectors[:, -1]).square(), 0.0)
    torch.testing.assert_close(spread.projections, tau, rtol=1e-6, atol=1e-6 * float(tau.max()))
    assert float(p @ spread.projections) == pytest.approx(spread.top_eigenvalue, rel=1e-9)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(problems())
def test_every_pass_takes_all_mass_of_a_row(problem):
    rows, _ = problem
    most = (len(rows) - 1) // 2
    found = [spectral_filter(rows @ rows.mT, f, floor=None) for f in range(most + 1)]
    for f, result in enumerate(found):
        assert result.num_passes <= min(len(rows), 2 * f + 1)
    values = [result.top_eigenvalue for result in found]
    assert values == sorted(values, reverse=True)


@pytest.mark.parametrize("name", sorted(set(ROBUST) - {"cge", "arc+nnm+filter", "monna"}))
def test_one_faulty_worker_too_many_moves_the_result_at_will(name):
    # The promise is for f faulty workers, and for no more.
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(11, 20, generator=generator, dtype=torch.float64)
    bounded, free = rows.clone(), rows.clone()
    bounded[:2], free[:6] = 1e3, 1e3
    assert float(build(name, 2)(bounded).abs().max()) < 10
    assert float(build(name, 2)(free).abs().max()) > 100


def test_nearest_neighbour_mixing_brings_the_median_nearer():
    # Workers whose data differ: each coordinate matters to a third of them, so that its median is zero.
    generator = torch.Generator().manual_seed(0)
    honest = torch.stack([torch.randperm(200, generator=generator) < 60 for _ in range(9)]).float()
    rows = torch.cat([honest, honest[:1].expand(3, -1)])
    alone, mixed = (build(name, 3)(rows) - honest.mean(dim=0) for name in ("median", "nnm+median"))
    assert float(mixed.norm()) < 0.6 * float(alone.norm())


def test_centred_clipping_comes_near_in_some_calls():
    generator = torch.Generator().manual_seed(0)
    row = torch.randn(50, generator=generator)
    rule = CenteredClipping(2)
    for _ in range(10):
        result = rule(torch.cat([row.expand(9, -1), torch.full((2, 50), 5.0)]))
    torch.testing.assert_close(result, row, rtol=0, atol=1e-3)
