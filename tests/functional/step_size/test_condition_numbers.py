"""Condition numbers against their definitions as generalized eigenvalue problems, and against known distributions."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, TensorDataset

from lightning_sgd import estimate_condition_numbers


def from_definitions(X):
    """L, L1, μ, κ̃ as the largest generalized eigenvalues that define them; for full column rank."""
    n = len(X)
    H = X.T @ X / n
    lengths = np.sum(X**2, axis=1)
    leverages = np.einsum("ij,jk,ik->i", X, np.linalg.inv(H), X)
    largest = [
        scipy.linalg.eigh(X.T @ (weights[:, None] * X) / n, H, eigvals_only=True)[-1]
        for weights in (lengths, leverages)
    ]
    eigenvalues = np.linalg.eigvalsh(H)
    return eigenvalues[-1], largest[0], eigenvalues[0], largest[1]


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(12, 60), d=st.integers(1, 8), scale=st.floats(1e-3, 1e3), seed=st.integers(0, 99)
)
def test_equals_the_definitions(n, d, scale, seed):
    X = scale * np.random.default_rng(seed).standard_normal((n, d))
    numbers = estimate_condition_numbers(torch.from_numpy(X))
    expected = from_definitions(X)
    ours = (numbers.L, numbers.L1, numbers.mu, numbers.kappa_tilde)
    np.testing.assert_allclose(ours, expected, rtol=1e-8)
    assert numbers.L <= numbers.L1 <= (X**2).sum(axis=1).max() * (1 + 1e-12)
    assert 1 <= numbers.kappa_tilde <= min(n, numbers.L1 / numbers.mu) * (1 + 1e-9)
    assert numbers.kappa == pytest.approx(numbers.L / numbers.mu)


def test_independent_rows_have_as_many_as_statistical_condition_number():
    X = torch.randn(7, 20, generator=torch.Generator().manual_seed(0))
    assert estimate_condition_numbers(X).kappa_tilde == pytest.approx(7.0)


def test_zero_directions_do_not_count():
    # Rank two in five dimensions: the smallest eigenvalue is the smallest that is not zero.
    basis = torch.tensor([[3.0, 0, 0, 0, 0], [0, 0, 1.0, 0, 0]])
    numbers = estimate_condition_numbers(basis.repeat(10, 1))
    assert (numbers.L, numbers.mu) == pytest.approx((4.5, 0.5))


def test_gaussian_data_approach_their_closed_form():
    # κ̃ → d + 2 and L1 → tr(H) + 2L as n grows; at n = 2·10⁵ and d = 3 to about a percent.
    scales = torch.tensor([1.0, 0.5, 0.25]).double()
    X = scales * torch.randn(200_000, 3, generator=torch.Generator().manual_seed(0)).double()
    numbers = estimate_condition_numbers(X)
    assert numbers.kappa_tilde == pytest.approx(5.0, rel=0.03)
    assert pytest.approx(1.3125 + 2.0, rel=0.03) == numbers.L1


@pytest.mark.parametrize("form", ["tensor", "tuple", "mapping", "mapped"])
def test_reads_batches_in_every_form(form):
    X = torch.randn(50, 2, 3, generator=torch.Generator().manual_seed(0))
    expected = estimate_condition_numbers(X.flatten(1)[:40])
    collate = {
        "tensor": None,
        "tuple": lambda rows: (torch.stack(rows), torch.zeros(len(rows))),
        "mapping": lambda rows: {"image": torch.stack(rows), "label": None},
        "mapped": lambda rows: {"label": None, "image": torch.stack(rows)},
    }[form]
    loader = DataLoader(X, batch_size=16, collate_fn=collate)
    feature_map = (lambda batch: batch["image"]) if form == "mapped" else None
    numbers = estimate_condition_numbers(loader, feature_map=feature_map, num_samples=40)
    assert numbers == expected


def test_reads_no_more_batches_than_it_needs():
    read = []

    def batches():
        for i in range(10):
            read.append(i)
            yield torch.randn(8, 3)

    estimate_condition_numbers(batches(), num_samples=16)
    assert read == [0, 1]


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (torch.empty(0, 3), "at least one sample"),
        ([], "at least one sample"),
        (torch.zeros(4, 2), "not all zero"),
        (torch.tensor([[float("nan")]]), "finite"),
    ],
)
def test_refuses_data_without_a_spectrum(features, message):
    with pytest.raises(ValueError, match=f"Expected `features` to be {message}"):
        estimate_condition_numbers(features)


def test_names_the_remedy_for_strange_batches():
    with pytest.raises(TypeError, match="Pass `feature_map`"):
        estimate_condition_numbers([("text",)])


def test_labels_of_a_loader_are_ignored():
    X = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    loader = DataLoader(TensorDataset(X, torch.arange(30)), batch_size=8)
    assert estimate_condition_numbers(loader) == estimate_condition_numbers(X)
