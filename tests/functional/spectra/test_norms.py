"""Frobenius and spectral norm by the Lanczos method against NumPy's decomposition in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lightning_sgd.functional.spectra.gram import GramQueue
from lightning_sgd.functional.spectra.norms import extreme_norms
from lightning_sgd.functional.spectra.spectral_stats import spectral_stats, spectral_stats_of


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def with_spectrum(sigma, rows, columns, seed=0):
    """A float32 matrix with these singular values and random singular vectors, made by NumPy."""
    rng = np.random.default_rng(seed)
    U = np.linalg.qr(rng.standard_normal((rows, len(sigma))))[0]
    V = np.linalg.qr(rng.standard_normal((columns, len(sigma))))[0]
    return torch.from_numpy(U * np.asarray(sigma) @ V.T).float()


def check(matrix, norms, rtol=1e-2):
    sigma = np.linalg.svd(matrix.double().numpy(), compute_uv=False)
    assert norms.two.item() == pytest.approx(np.linalg.norm(sigma), rel=1e-5)
    # From below, up to rounding, and by no more than the card says: one percent of the square.
    assert norms.infinity.item() <= sigma[0] * (1 + 1e-5)
    assert norms.infinity.item() ** 2 >= sigma[0] ** 2 * (1 - rtol)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(100, 400),
    columns=st.integers(100, 400),
    exponent=st.integers(-30, 30),
    seed=st.integers(0, 10**6),
)
@example(rows=129, columns=129, exponent=0, seed=0)
def test_of_random_matrices(rows, columns, exponent, seed):
    # The dense spectrum of a new layer is the hardest; squares leave the range of float32 beyond 10^±19.
    matrix = 10.0**exponent * normal(rows, columns, seed=seed)
    check(matrix, extreme_norms([matrix])[0])


@settings(max_examples=40, deadline=None)
@given(
    gap=st.sampled_from([0.0, 1e-6, 1e-4, 1e-3, 1e-2, 0.1]),
    num_equal=st.integers(1, 20),
    rest=st.floats(0.0, 0.999),
    seed=st.integers(0, 10**6),
)
def test_of_nearly_equal_largest_values(gap, num_equal, rest, seed):
    # Directions need not be told apart to get the norm.
    sigma = np.concatenate([1 - gap * np.arange(num_equal) / 20, np.linspace(rest, 0, 140)])
    matrix = with_spectrum(sigma, 200, 300, seed)
    check(matrix, extreme_norms([matrix])[0])


@pytest.mark.parametrize("rank", [1, 2, 9])
def test_of_low_rank_where_nothing_is_left_after_some_steps(rank):
    matrix = with_spectrum(np.arange(rank, 0, -1.0), 200, 150)
    check(matrix, extreme_norms([matrix])[0], rtol=1e-5)
    check(torch.eye(300), extreme_norms([torch.eye(300)])[0], rtol=1e-5)


def test_small_and_large_matrices_keep_their_order():
    matrices = [normal(5, 9), normal(200, 300), normal(300, 7), normal(150, 140), normal(12, 12)]
    for matrix, norms in zip(matrices, extreme_norms(iter(matrices)), strict=True):
        check(matrix, norms)
        assert norms.four.isnan()
    assert extreme_norms([]) == []


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_matrix_that_is_not_finite_leaves_the_others_alone(bad):
    matrices = [normal(200, 300, seed=i) for i in range(3)]
    expected = extreme_norms(matrices)
    matrices[1] = matrices[1].clone()
    matrices[1][5, 6] = bad
    first, second, third = extreme_norms(matrices)
    assert all(norm.isnan() for norm in second)
    assert (first.infinity, third.infinity) == (expected[0].infinity, expected[2].infinity)


def test_zeros_have_norm_and_rank_zero():
    norms = extreme_norms([torch.zeros(200, 300)])[0]
    assert (norms.two, norms.infinity, norms.stable_rank) == (0, 0, 0)


def test_bfloat16_and_float64_are_computed_in_at_least_float32():
    for dtype in (torch.bfloat16, torch.float64):
        matrix = normal(200, 300).to(dtype)
        norms = extreme_norms([matrix])[0]
        check(matrix, norms)
        assert norms.infinity.dtype == torch.promote_types(dtype, torch.float32)


def test_it_repeats_itself_and_leaves_random_states_alone():
    matrix, state = normal(300, 300), torch.get_rng_state()
    first, second = (extreme_norms([matrix])[0].infinity for _ in range(2))
    assert first == second
    assert torch.equal(state, torch.get_rng_state())


def test_the_cheap_stable_rank_needs_no_gram_matrix(monkeypatch):
    matrix = normal(2, 150, 200)
    exact = spectral_stats(matrix, measures=["stable_rank"])["stable_rank"]

    def refuse(*args):
        raise AssertionError("a Gram matrix was formed")

    monkeypatch.setattr(GramQueue, "put", refuse)
    batch = spectral_stats(matrix, measures=["stable_rank"], method="cheap")["stable_rank"]
    each = spectral_stats_of(matrix, measures=["stable_rank"], method="cheap")["stable_rank"]
    assert batch.shape == each.shape == (2,)
    torch.testing.assert_close(batch, exact, rtol=1e-2, atol=0)
    torch.testing.assert_close(each, batch, rtol=0, atol=0)
