"""Projections drawn from the Gram matrix against projections on directions as long as the model, and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from lightning_sgd import effective_dimension, gram_projections, shapiro_wilk
from lightning_sgd.functional.noise.gram_projections import noise_gram, norm_excess_kurtosis

M, D = 120, 600


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def student(*shape, seed=0):
    return normal(*shape, seed=seed) / normal(*shape, 3, seed=seed + 1).square().mean(-1).sqrt()


ROWS = {
    "Gaussian": lambda: normal(M, D),
    "Student": lambda: student(M, D),
    "exponential": lambda: torch.empty(M, D).double().exponential_(generator=generator()),
    "rare": lambda: (torch.rand(M, D, generator=generator()) < 0.02).double(),
    "multivariate Student": lambda: normal(M, D) * student(M, 1, seed=3),
    "scales": lambda: normal(M, D) * (0.3 * normal(M, 1, seed=3)).exp(),
    "few factors": lambda: (
        normal(M, 3).square() @ normal(3, D, seed=3) + 0.05 * normal(M, D, seed=5)
    ),
}


@pytest.mark.parametrize("law", ROWS)
def test_drawn_in_the_span_and_by_long_directions_are_of_one_law(law):
    # The oracle draws directions in all coordinates, and multiplies.
    rows = ROWS[law]()
    noise = rows - rows.mean(dim=0)
    exact = normal(4000, D, seed=7) @ noise.T
    drawn = gram_projections(noise_gram(rows), 4000, generator(8))
    here, there = (shapiro_wilk(z).statistic.numpy() for z in (drawn, exact))
    assert stats.ks_2samp(here, there).pvalue > 0.001
    # All second moments, not only those of the tests: K is what both have for a covariance.
    gram = noise @ noise.T
    spread = (gram.diagonal()[:, None] * gram.diagonal() + gram**2).sqrt() / 4000**0.5
    for z in (drawn, exact):
        assert ((z.T @ z / 4000 - gram).abs() / spread).max() < 5.5


def test_orthonormal_vectors_have_standard_normal_projections():
    z = gram_projections(torch.eye(50), 2000, generator())
    assert stats.kstest(z.flatten().numpy(), "norm").pvalue > 0.01
    assert abs((shapiro_wilk(z).p_value < 0.05).double().mean() - 0.05) < 0.02


def test_gram_matrices_of_parts_add_up():
    rows = normal(40, 9000)
    whole = noise_gram(rows)
    centered = rows - rows.mean(dim=0)
    np.testing.assert_allclose(whole, centered @ centered.T, rtol=1e-10, atol=1e-9)
    parts = sum(noise_gram(part) for part in rows.split([1, 4999, 4000], dim=1))
    np.testing.assert_allclose(parts, whole, rtol=1e-12, atol=1e-9)
    np.testing.assert_allclose(noise_gram(rows.float()), whole, rtol=1e-5, atol=1e-3)
    assert whole.sum(dim=1).abs().max() < 1e-8
    assert noise_gram(torch.ones(3, 0)).tolist() == [[0.0] * 3] * 3


def test_small_noise_on_large_gradients_keeps_its_digits():
    # Late in training with large batches the noise is a thousandth of the gradient; in float32 a mean would eat digits.
    noise = 1e-3 * normal(64, 5000).float()
    rows = (noise.double() + 4.0).float()
    exact = rows.double() - rows.double().mean(dim=0)
    np.testing.assert_allclose(noise_gram(rows), exact @ exact.T, rtol=1e-9, atol=1e-15)


@settings(max_examples=30, deadline=None)
@given(num=st.integers(2, 30), seed=st.integers(0, 1000))
def test_the_effective_dimension_is_the_participation_of_eigenvalues(num, seed):
    values = normal(num, seed=seed).square()
    basis = torch.linalg.qr(normal(num, num, seed=seed + 1)).Q
    found = effective_dimension(basis * values @ basis.T).item()
    assert found == pytest.approx((values.sum() ** 2 / (values**2).sum()).item(), rel=1e-9)
    assert 1 - 1e-9 <= found <= num + 1e-9


def test_lengths_of_two_sizes_give_their_kurtosis():
    # r² is 1/2 or 2: mean 1.25, variance 0.5625, kurtosis 3·0.5625/1.5625.
    rows = normal(200, 20_000) / 20_000**0.5
    rows[::2] *= 0.5**0.5
    rows[1::2] *= 2.0**0.5
    gram = rows @ rows.T
    assert norm_excess_kurtosis(gram).item() == pytest.approx(1.08, rel=0.03)
    z = gram_projections(gram, 5000, generator())
    pooled = z / z.square().mean().sqrt()
    assert (pooled**4).mean().item() - 3 == pytest.approx(1.08, rel=0.1)


def test_wrong_arguments_are_refused_and_broken_ones_give_nan():
    with pytest.raises(ValueError, match="Expected `num_directions` to be at least 1, got 0"):
        gram_projections(torch.eye(2), 0)
    with pytest.raises(ValueError, match=r"Expected `gram` to be of shape \(m, m\), got \(2, 3\)"):
        gram_projections(torch.ones(2, 3), 1)
    with pytest.raises(ValueError, match=r"Expected `rows` to be of shape \(m, d\)"):
        noise_gram(torch.ones(3))
    for wrong in (-torch.eye(3), torch.tensor([[1.0, 5.0], [5.0, 1.0]])):
        with pytest.raises(ValueError, match="Expected `gram` to be without negative eigenvalues"):
            gram_projections(wrong, 1)
    with pytest.raises(ValueError, match="Expected `gram` to be symmetric"):
        gram_projections(torch.eye(3) + torch.ones(3, 3).triu(1), 1)
    with pytest.raises(ValueError, match=r"Expected `gram` to be of shape \(m, m\), got \(2, 3\)"):
        effective_dimension(torch.ones(2, 3))
    broken = torch.eye(3)
    broken[0, 0] = torch.nan
    assert gram_projections(broken, 4).isnan().all()
    assert torch.equal(gram_projections(torch.zeros(3, 3), 4), torch.zeros(4, 3).double())


def test_the_effective_dimension_of_what_is_no_gram_matrix_is_nan():
    unbounded = torch.eye(2)
    unbounded[0, 1] = unbounded[1, 0] = torch.inf  # a finite trace over an infinite sum
    indefinite = torch.tensor([[1.0, 5.0], [5.0, 1.0]])
    broken = torch.stack([unbounded, -torch.eye(2), indefinite, torch.zeros(2, 2)])
    assert effective_dimension(broken).isnan().all()
    assert effective_dimension(1e30 * torch.eye(5)).item() == 5.0  # squares leave float32
    assert effective_dimension(1e-30 * torch.eye(5)).item() == 5.0
    assert effective_dimension(torch.eye(5, dtype=torch.int64)).item() == 5.0
