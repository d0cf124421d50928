"""Norms of the spectrum of a matrix that need no decomposition."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_sgd._validation import expect
from lightning_sgd.functional.precision import full_precision
from lightning_sgd.functional.spectra.gram import GramQueue, eigenvalues, normalize, where_finite

SMALL_SIDE = 128
"""Up to here all eigenvalues of a Gram matrix take no longer than the Lanczos method."""


class SchattenNorms(NamedTuple):
    """Norms of the vector of singular values, which need no eigenvalue decomposition.

    Attributes:
        two: The Frobenius norm ‖W‖_F.
        four: The fourth root of Σσ⁴, the square root of ‖WWᵀ‖_F.
        infinity: The spectral norm σ₁.
    """

    two: Tensor
    four: Tensor
    infinity: Tensor

    @property
    def stable_rank(self) -> Tensor:
        """‖W‖_F² / σ₁²; 0 for a zero matrix."""
        return torch.where(self.two == 0, 0.0, (self.two / self.infinity).square())

    @property
    def participation_ratio(self) -> Tensor:
        """‖W‖_F⁴ / ‖WWᵀ‖_F²; 0 for a zero matrix."""
        return torch.where(self.two == 0, 0.0, (self.two / self.four) ** 4)


def schatten_norms(
    matrices: Iterable[Tensor], *, num_steps: int = 32, max_batch_elements: int = 2**24
) -> list[SchattenNorms]:
    """The norms behind stable rank and participation ratio, for the price of a Gram matrix.

    Where the short side is above 128, the spectral norm is a lower bound by ``num_steps`` steps of the Lanczos method
    from a fixed random vector: exact for a spectrum with a gap, about 0.1 % below for the dense spectrum of a large
    random matrix. Shorter sides get it from their eigenvalues.

    Args:
        matrices: As for :func:`singular_values`.
        num_steps: Steps of the Lanczos method, at least 1; each is one product of the Gram matrix with a vector.
        max_batch_elements: As for :func:`singular_values`.

    Returns:
        For each matrix norms of shape (…).

    Raises:
        ValueError: If an argument is out of range or a matrix is complex or has no elements.

    Example:
        >>> norms = schatten_norms([torch.tensor([[3.0, 0.0], [0.0, 4.0]])])[0]
        >>> [round(norm.item(), 4) for norm in norms]
        [5.0, 4.2846, 4.0]
    """
    expect(num_steps >= 1, "num_steps", "at least 1", num_steps, "The default is 32.")
    queue = GramQueue(lambda grams: _norms_of_grams(grams, num_steps), max_batch_elements)
    scales: list[Tensor] = []
    with full_precision():
        for index, matrix in enumerate(matrices):
            scaled, scale = normalize(matrix, torch.float32)
            scales.append(scale)
            queue.put(index, scaled)
        results = queue.finish()
    return [
        SchattenNorms(*(norms * scale).unbind(dim=-1))
        for norms, scale in zip(results, scales, strict=True)
    ]


def _norms_of_grams(grams: Tensor, num_steps: int) -> Tensor:
    def norms(grams: Tensor) -> Tensor:
        trace = grams.diagonal(dim1=-2, dim2=-1).sum(dim=-1)
        squares = (trace, torch.linalg.matrix_norm(grams), _largest_eigenvalue(grams, num_steps))
        return torch.stack(squares, dim=-1).clamp_min(0.0).sqrt()

    return where_finite(norms, grams)


def _largest_eigenvalue(grams: Tensor, num_steps: int) -> Tensor:
    """By the Lanczos method with full orthogonalisation, from below."""
    size = grams.shape[-1]
    if size <= SMALL_SIDE:
        return eigenvalues(grams)[..., -1]
    start = start_direction(grams)[:, None]
    basis = start.expand(*grams.shape[:-1], 1)
    for _ in range(min(num_steps, size) - 1):
        image = grams @ basis[..., -1:]
        basis = torch.cat([basis, next_direction(image, basis)], dim=-1)
    return eigenvalues(basis.mT @ grams @ basis)[..., -1]


def start_direction(like: Tensor) -> Tensor:
    """A random vector of length one, always the same for the same size, type and device, of shape (size,).

    Args:
        like: Its second last dimension, type and device are taken.
    """
    generator = torch.Generator(like.device).manual_seed(0)
    size = like.shape[-2]
    start = torch.randn(size, generator=generator, device=like.device, dtype=like.dtype)
    direction: Tensor = start / torch.linalg.vector_norm(start)
    return direction


def next_direction(image: Tensor, basis: Tensor) -> Tensor:
    """The last direction times the matrix, made orthogonal to the basis; zero once the basis is invariant.

    Args:
        image: The product, of shape (…, m, 1).
        basis: The directions so far, of shape (…, m, k).
    """
    rest = image
    for _ in range(2):
        rest = rest - basis @ (basis.mT @ rest)
    length = torch.linalg.vector_norm(rest, dim=-2, keepdim=True)
    noise = (
        1e3 * torch.finfo(image.dtype).eps * torch.linalg.vector_norm(image, dim=-2, keepdim=True)
    )
    return torch.where(length > noise, rest / length, 0.0)
