"""Measures of rank: numbers by hand, closed forms, and order and invariance for random spectra."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_sgd.functional.spectra import rank_measures
from lightning_sgd.functional.spectra.rank_measures import (
    effective_rank,
    energy_rank,
    hard_rank,
    intrinsic_dimension,
    nuclear_ratio,
    participation_ratio,
    rankme,
    stable_rank,
    threshold_rank,
)
from lightning_sgd.functional.spectra.spectral_stats import (
    SpectralMeasures,
    spectral_stats,
    spectral_stats_of,
)

SOFT = {
    "stable_rank": stable_rank,
    "participation_ratio": participation_ratio,
    "energy_entropy_rank": lambda sigma: effective_rank(sigma, power=2),
    "effective_rank": effective_rank,
    "nuclear_ratio": nuclear_ratio,
    "intrinsic_dimension": intrinsic_dimension,
}
EVERY = (
    "rank",
    "hard_rank",
    "energy_rank",
    "stable_rank",
    "effective_rank",
    "participation_ratio",
    "nuclear_ratio",
    "intrinsic_dimension",
    "frobenius_norm",
    "spectral_norm",
)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("matrix", [False, True])
def test_of_two_one_one_by_hand(matrix):
    # Σσ² = 6, Σσ⁴ = 18, Σσ = 4; p = (½, ¼, ¼) has entropy 1½ log 2; p = (⅔, ⅙, ⅙) has log 6 − ⅔ log 4.
    expected = {
        "stable_rank": 1.5,
        "effective_rank": 2**1.5,
        "participation_ratio": 2.0,
        "nuclear_ratio": 2.0,
        "intrinsic_dimension": 8 / 3,
        "rank@0.408": 3.0,
        "rank@0.409": 1.0,
        "rank@0.816": 1.0,
        "rank@0.817": 0.0,
        "hard_rank": 3.0,
        "energy_rank@0.66": 1.0,
        "energy_rank@0.67": 2.0,
        "energy_rank@0.84": 3.0,
        "frobenius_norm": math.sqrt(6),
        "spectral_norm": 2.0,
    }
    weight = torch.diag(torch.tensor([1.0, 2.0, 1.0]))
    arguments = {"tol": (0.408, 0.409, 0.816, 0.817), "eta": (0.66, 0.67, 0.84)}
    if matrix:
        stats = spectral_stats(weight, measures=EVERY, **arguments)
    else:
        weights = [weight, torch.eye(5)]
        stats = spectral_stats_of(weights, measures=EVERY, **arguments)
        stats = {key: values[0] for key, values in stats.items()}
    assert {key: value.item() for key, value in stats.items()} == pytest.approx(expected, rel=1e-6)
    squares = spectral_stats(weight, measures=["effective_rank"], power=2)["effective_rank"]
    assert squares.item() == pytest.approx(6 / 4 ** (2 / 3), rel=1e-6)
    assert squares.item() == pytest.approx(2.381102, rel=1e-6)


@pytest.mark.parametrize("name", SOFT)
@pytest.mark.parametrize("r", [1, 7, 300])
def test_equal_singular_values_count_fully_and_one_alone_counts_one(name, r):
    assert SOFT[name](torch.ones(r)).item() == pytest.approx(r, rel=1e-5)
    assert SOFT[name](torch.eye(r)[0]).item() == pytest.approx(1.0)


@pytest.mark.parametrize("name", ["threshold_rank", "energy_rank", *SOFT])
def test_zeros_give_zero_and_nan_gives_nan(name):
    # Zero has no spectrum to speak of: 0 stands for "dead", and NaN must not pass for it.
    measure = SOFT.get(name) or getattr(rank_measures, name)
    sigma = torch.tensor([[0.0, 0.0], [torch.nan, torch.nan], [1.0, 0.0]])
    values = measure(sigma)
    assert values[0] == 0
    assert values[1].isnan()
    assert values[2] == 1


@pytest.mark.parametrize("measure", [name for name in EVERY if not name.endswith("norm")])
def test_a_rank_one_matrix_has_rank_one_by_every_measure(measure):
    # Rounding in a Gram matrix of 512 rows must not add up to further directions: each measure by itself has to ask
    # for the accuracy that it needs.
    weight = torch.outer(normal(512), normal(600, seed=1))
    for key, value in spectral_stats(weight, measures=[measure], tol=[1e-2], eta=[0.9]).items():
        assert value.item() == pytest.approx(1.0, abs=2e-3), key


spectra = st.lists(st.floats(0, 1), min_size=1, max_size=30).filter(lambda sigma: max(sigma) > 1e-3)


@settings(max_examples=200, deadline=None)
@given(sigma=spectra)
def test_measures_are_ordered_and_bounded(sigma):
    sigma = torch.tensor(sigma, dtype=torch.float64)
    stable, ratio, energy, effective = (float(SOFT[name](sigma)) for name in list(SOFT)[:4])
    hard = float(threshold_rank(sigma, 0.0))
    ordered = [1.0, stable, ratio, energy, effective, hard]
    assert all(a <= b * (1 + 1e-9) for a, b in itertools.pairwise(ordered))
    assert stable <= nuclear_ratio(sigma) * (1 + 1e-9)
    assert nuclear_ratio(sigma) <= intrinsic_dimension(sigma) * (1 + 1e-9) <= hard * (1 + 2e-9)


@settings(max_examples=60, deadline=None)
@given(sigma=spectra, exponent=st.integers(-20, 20), tol=st.floats(1e-3, 0.9))
def test_scale_does_not_matter_in_float32(sigma, exponent, tol):
    # Weights of scale-invariant layers drift over orders of magnitude; fourth powers must not overflow.
    base = torch.tensor(sigma)
    scaled = base * 2.0 ** (3 * exponent)  # a power of two: not even rounding differs
    functions = [*SOFT.values(), energy_rank, rankme, lambda s: threshold_rank(s, tol)]
    for function in functions:
        torch.testing.assert_close(function(scaled), function(base), rtol=1e-6, atol=0)
    assert rank_measures.frobenius_norm(1e30 * torch.ones(4)).item() == pytest.approx(2e30)


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(2, 24),
    columns=st.integers(2, 24),
    exponent=st.integers(-18, 18),
    seed=st.integers(0, 99),
)
def test_rotation_transposition_and_scale_of_a_matrix_do_not_matter(rows, columns, exponent, seed):
    W = normal(rows, columns, seed=seed).double()
    U, V = (np.linalg.qr(normal(n, n, seed=n).numpy())[0] for n in (rows, columns))
    turned = torch.from_numpy(U).double() @ W @ torch.from_numpy(V).double()
    measures = [name for name in EVERY if not name.endswith("norm") and name != "energy_rank"]
    expected = spectral_stats(W, measures=measures, tol=(1e-6,))
    for other in (W.mT, turned, 10.0**exponent * W.float(), -W):
        stats = spectral_stats(other, measures=measures, tol=(1e-6,))
        for key, value in stats.items():
            assert value.item() == pytest.approx(expected[key].item(), rel=1e-4), key


def test_gaussian_matrices_approach_their_closed_forms():
    # E: (mn)² / (mn(m+n+1)) for the participation ratio, m/(1+1)² for the stable rank of a large square one.
    stats = spectral_stats(normal(64, 64, 64), measures=["participation_ratio", "stable_rank"])
    assert stats["participation_ratio"].mean().item() == pytest.approx(64 * 64 / 129, rel=0.01)
    large = spectral_stats(normal(512, 512), measures=["stable_rank"])["stable_rank"]
    assert large.item() == pytest.approx(512 / 4, rel=0.05)
    kaiming = torch.nn.Linear(64, 64).weight
    ratio = spectral_stats(kaiming, measures=["participation_ratio"])["participation_ratio"]
    assert ratio.item() == pytest.approx(32, rel=0.05)


@pytest.mark.parametrize(
    ("dtype", "ratio", "effective"), [(torch.bfloat16, 5.6e-4, 8.45), (torch.float16, 6.6e-5, 8.0)]
)
def test_half_precision_makes_the_hard_rank_meaningless(dtype, ratio, effective):
    # A product of two 256 × 8 Gaussians: rounding fills the null space, which only a threshold ignores.
    exact = normal(256, 8) @ normal(8, 256, seed=1)
    rounded = exact.to(dtype)
    sigma = np.linalg.svd(rounded.double().numpy(), compute_uv=False)
    assert sigma[8] / sigma[0] == pytest.approx(ratio, rel=0.25)
    before, after = (
        {k: v.item() for k, v in spectral_stats(W, measures=EVERY).items()}
        for W in (exact, rounded)
    )
    assert before["rank@0.001"] == after["rank@0.001"] == 8
    assert before["hard_rank"] == 8
    assert after["hard_rank"] > 80
    assert after["effective_rank"] - before["effective_rank"] == pytest.approx(
        effective - 7.92, abs=0.12
    )


def test_the_hard_rank_is_that_of_torch():
    # Singular values on either side of the tolerance, max(m, n)·ε ≈ 7.6e-6.
    for smallest, expected in ((3e-5, 3), (1e-6, 2)):
        W = torch.zeros(8, 64)
        W[0, 0], W[1, 1], W[2, 2] = 1.0, 0.5, smallest
        assert torch.linalg.matrix_rank(W) == expected
        assert spectral_stats(W, measures=["hard_rank"])["hard_rank"] == expected
        sigma = torch.linalg.svdvals(W)
        assert hard_rank(sigma, 8, 64, torch.float32) == expected


@settings(max_examples=60, deadline=None)
@given(sigma=spectra, eta=st.floats(0.01, 1.0))
def test_the_energy_rank_is_the_smallest_that_holds_the_share(sigma, eta):
    assert energy_rank(torch.ones(4), 0.5) == 2  # exactly half is enough
    squares = sorted((x * x for x in sigma), reverse=True)
    k = int(energy_rank(torch.tensor(sigma, dtype=torch.float64), eta))
    assert math.fsum(squares[:k]) >= eta * math.fsum(squares) * (1 - 1e-12)
    assert math.fsum(squares[: k - 1]) <= eta * math.fsum(squares) * (1 + 1e-12)


def test_rankme_follows_its_formula():
    sigma = np.array([5.0, 2.0, 0.1, 0.0])
    p = sigma / sigma.sum() + 1e-5
    expected = np.exp(-(p * np.log(p)).sum())
    assert rankme(torch.from_numpy(sigma), eps=1e-5).item() == pytest.approx(expected, rel=1e-12)
    assert rankme(torch.ones(50), eps=1e-4).item() > 50  # not normalised again


def test_matrices_of_all_sizes_share_one_table():
    # What the callback logs: every layer, whatever its shape and type, and dead layers too.
    weights = [normal(9, 30), normal(40, 9, seed=1).double(), torch.zeros(5, 5), torch.eye(12)]
    weights.append(torch.full((3, 4), torch.inf))
    table = spectral_stats_of(iter(weights), measures=EVERY)
    assert tuple(table) == SpectralMeasures(measures=EVERY).keys
    for i, weight in enumerate(weights[:4]):
        for key, value in spectral_stats(weight, measures=EVERY).items():
            assert table[key][i].item() == pytest.approx(value.item(), rel=1e-5), key
            assert weight.any() or value == 0
    assert all(values[4].isnan() for values in table.values())
    assert all(values.shape == (0,) for values in spectral_stats_of([], measures=EVERY).values())


def test_batches_have_the_measures_of_their_matrices():
    batch = normal(2, 3, 10, 14)
    stats = spectral_stats(batch, measures=EVERY)
    for key, values in stats.items():
        assert values.shape == (2, 3)
        alone = spectral_stats(batch[1, 2], measures=EVERY)[key]
        assert values[1, 2].item() == pytest.approx(alone.item(), rel=1e-5)


def test_the_cheap_method_agrees_with_the_spectrum():
    weights = [normal(20, 30), normal(200, 220, seed=1), torch.zeros(4, 4)]
    measures = ["stable_rank", "participation_ratio", "frobenius_norm", "spectral_norm"]
    cheap = spectral_stats_of(weights, measures=measures, method="cheap")
    full = spectral_stats_of(weights, measures=measures)
    for key in measures:
        torch.testing.assert_close(cheap[key].double(), full[key].double(), rtol=6e-3, atol=0)
    alone = spectral_stats(weights[1], measures=measures, method="cheap")
    assert {k: v.item() for k, v in alone.items()} == {k: v[1].item() for k, v in cheap.items()}


@pytest.mark.parametrize("method", ["auto", "gram", "svd", "sketch"])
def test_every_method_measures_the_same(method):
    weight = normal(30, 50)
    expected = np.linalg.svd(weight.numpy(), compute_uv=False)
    stats = spectral_stats(weight, measures=["stable_rank", "rank"], tol=[0.1], method=method)
    assert stats["stable_rank"].item() == pytest.approx(
        (expected**2).sum() / expected[0] ** 2, 1e-4
    )
    assert stats["rank@0.1"] == (expected / np.linalg.norm(expected) > 0.1).sum()
    relative = spectral_stats(weight, measures=["rank"], tol=[0.5], tol_norm="spectral")
    assert relative["rank@0.5"] == (expected > 0.5 * expected[0]).sum()


def test_nothing_about_the_weight_changes():
    weight = torch.nn.Parameter(normal(10, 12))
    state, before = torch.get_rng_state(), weight.detach().clone()
    stats = spectral_stats(weight, measures=EVERY) | spectral_stats(
        weight, measures=["rank"], method="sketch"
    )
    assert not any(value.requires_grad for value in stats.values())
    assert weight.grad is None
    assert torch.equal(weight, before)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"measures": []}, "`measures` to be a list of some of"),
        ({"measures": ["srank"]}, "`measures` to be one of"),
        ({"measures": ["rank"], "method": "cheap"}, "`measures` to be .* another `method`"),
        ({"tol": []}, "`tol` to be a list of numbers in"),
        ({"tol": 1e-3}, "`tol` to be a list of numbers in"),
        ({"tol": [1.0]}, "`tol` to be a list of numbers in"),
        ({"eta": [0.0]}, "`eta` to be a list of numbers in"),
        ({"tol_norm": "nuclear"}, "`tol_norm` to be one of"),
        ({"method": "qr"}, "`method` to be one of"),
        ({"power": 3}, "`power` to be one of"),
        ({"dtype": torch.bfloat16}, "`dtype` to be one of"),
        (
            {"method": "gram", "dtype": torch.float32, "tol": [1e-4]},
            "`method` to be one that resolves 0.0001 for `rank`.* resolves 3.5e-04",
        ),
        (
            {"method": "gram", "dtype": torch.float32, "measures": ["hard_rank"]},
            "`method` to be one that resolves .* for `hard_rank`",
        ),
    ],
)
def test_refuses_settings_that_mean_nothing(arguments, message):
    with pytest.raises(ValueError, match=f"Expected {message}"):
        spectral_stats(torch.eye(3), **arguments)


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        (threshold_rank, {"norm": "nuclear"}, "`norm` to be 'fro' or 'spectral'"),
        (energy_rank, {"eta": 1.5}, r"`eta` to be in \(0, 1\]"),
        (effective_rank, {"power": 3}, "`power` to be 1 or 2"),
    ],
)
def test_refuses_arguments_out_of_range(function, arguments, message):
    with pytest.raises(ValueError, match=f"Expected {message}"):
        function(torch.ones(3), **arguments)


def test_a_table_needs_matrices():
    with pytest.raises(
        ValueError, match=r"Expected `matrices` to be two-dimensional, got \(2, 3, 4\)"
    ):
        spectral_stats_of([torch.zeros(2, 3, 4)])
