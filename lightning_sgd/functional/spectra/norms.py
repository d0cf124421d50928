r"""Norms of the spectrum of a matrix that need no decomposition.

With the Gram matrix, :func:`schatten_norms` also gives the participation ratio. :func:`extreme_norms` reads a large
matrix a few times only, which is enough for the stable rank: no Gram matrix, no decomposition.

The Lanczos method finds :math:`\sigma_1^2`, the largest eigenvalue of :math:`WW^\top`, from products with vectors. From
a random start, k steps approach it from below. Where the spectrum is dense, as in a layer just initialised, the missing
part falls about as :math:`1/k^2`, so that the growth over the last p steps times k/2p estimates it. For the first 24
matrices of GPT-2 small at initialisation :func:`extreme_norms` stops after 29 steps on average. The missing part of
:math:`\sigma_1^2` is then 10⁻⁵ in the median, and 0.9 % at worst, where two of the largest values are nearly equal and
the start is almost orthogonal to the directions of one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_sgd._validation import expect
from lightning_sgd.functional.precision import full_precision
from lightning_sgd.functional.spectra.gram import (
    GramQueue,
    as_wide,
    eigenvalues,
    normalize,
    where_finite,
)

SMALL_SIDE = 128
"""Up to this size all eigenvalues of a Gram matrix take no longer than the Lanczos method."""
MAX_STEPS = 64
# A check reads a number on the host, and waits for the device.
STEPS_BETWEEN_CHECKS = 4
GROWTH_OVER = 2  # checks


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
    """Compute the norms behind stable rank and participation ratio, at the cost of a Gram matrix.

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
    if num_steps < 1:
        expect(False, "num_steps", "at least 1", num_steps, "The default is 32.")
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


def extreme_norms(matrices: Iterable[Tensor], *, rtol: float = 2e-3) -> list[SchattenNorms]:
    """Compute the Frobenius and spectral norm of each matrix; the fourth root of Σσ⁴ is NaN.

    The spectral norm of short sides up to 128 comes from eigenvalues. Otherwise it is a lower bound from a fixed random
    vector, so that the same matrix has the same value on every machine of a kind, whatever was measured before.

    Cost: 16 to 128 passes over an m × n matrix, the more the denser the spectrum is at its top.

    Args:
        matrices: As for ``singular_values``, with two dimensions.
        rtol: Stop when no more than this share of σ₁² seems to be missing; by default about 1 % at worst is.

    Example:
        >>> norms = extreme_norms([torch.diag(torch.arange(200.0))])[0]
        >>> round(norms.infinity.item()), round(norms.two.item())
        (199, 1627)
    """
    large: dict[int, SchattenNorms] = {}
    num_matrices = 0

    def small() -> Iterator[Tensor]:
        nonlocal num_matrices
        for matrix in matrices:
            wide = as_wide(matrix, torch.float32)
            if min(wide.shape) <= SMALL_SIDE:
                yield wide
            else:
                large[num_matrices] = _norms_of_large(wide, rtol)
            num_matrices += 1

    # One pass: norms of large matrices are computed while small ones are collected for their batches.
    with full_precision():
        others = iter([_without_four(norms) for norms in schatten_norms(small())])
    return [large[i] if i in large else next(others) for i in range(num_matrices)]


def _norms_of_grams(grams: Tensor, num_steps: int) -> Tensor:
    def norms(grams: Tensor) -> Tensor:
        trace = grams.diagonal(dim1=-2, dim2=-1).sum(dim=-1)
        squares = (trace, torch.linalg.matrix_norm(grams), _largest_eigenvalue(grams, num_steps))
        return torch.stack(squares, dim=-1).clamp_min(0.0).sqrt()

    return where_finite(norms, grams)


def _largest_eigenvalue(grams: Tensor, num_steps: int) -> Tensor:
    """Bound the largest eigenvalue from below by the Lanczos method with full orthogonalisation."""
    size = grams.shape[-1]
    if size <= SMALL_SIDE:
        return eigenvalues(grams)[..., -1]
    start = _start_direction(grams)[:, None]
    basis = start.expand(*grams.shape[:-1], 1)
    for _ in range(min(num_steps, size) - 1):
        image = grams @ basis[..., -1:]
        basis = torch.cat([basis, _next_direction(image, basis)], dim=-1)
    return eigenvalues(basis.mT @ grams @ basis)[..., -1]


def _start_direction(like: Tensor) -> Tensor:
    """Draw a unit vector of size ``like.shape[-2]``, the same in every call, so that results are reproducible."""
    # A generator of its own, so that measuring leaves the random numbers of the training as they are.
    generator = torch.Generator(like.device).manual_seed(0)
    size = like.shape[-2]
    start = torch.randn(size, generator=generator, device=like.device, dtype=like.dtype)
    direction: Tensor = start / torch.linalg.vector_norm(start)
    return direction


def _next_direction(image: Tensor, basis: Tensor) -> Tensor:
    """Make an image (…, m, 1) orthogonal to a basis (…, m, k) and scale it; zero once the basis is invariant."""
    rest = image
    for _ in range(
        2
    ):  # once leaves a part along the basis where the rest is short: twice is enough
        rest = rest - basis @ (basis.mT @ rest)
    length = torch.linalg.vector_norm(rest, dim=-2, keepdim=True)
    noise = (
        1e3 * torch.finfo(image.dtype).eps * torch.linalg.vector_norm(image, dim=-2, keepdim=True)
    )
    # A rest as short as its rounding has a random direction, and scaled up would not be orthogonal to the basis.
    return torch.where(length > noise, rest / length, 0.0)


def _without_four(norms: SchattenNorms) -> SchattenNorms:
    return norms._replace(four=torch.full_like(norms.four, torch.nan))


def _norms_of_large(matrix: Tensor, rtol: float) -> SchattenNorms:
    two = _frobenius_norm(matrix)
    smallest = torch.finfo(matrix.dtype).smallest_normal
    if not smallest**0.5 < two < torch.inf:  # squares overflow or vanish
        two = _frobenius_norm(matrix.double()).to(two)
    nan = torch.full_like(two, torch.nan)
    if not two.isfinite():
        return SchattenNorms(nan, nan, nan)
    short = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT
    share = _largest_share(short, two.clamp_min(smallest), rtol)
    return SchattenNorms(two, nan, two * share.sqrt())


def _frobenius_norm(matrix: Tensor) -> Tensor:
    rows = torch.linalg.vector_norm(matrix, dim=1)  # in one sum float32 would lose a digit
    norm: Tensor = torch.linalg.vector_norm(rows)
    return norm


def _largest_share(rows: Tensor, norm: Tensor, rtol: float) -> Tensor:
    """Bound σ₁²/‖W‖_F² from below."""
    num_steps = min(MAX_STEPS, len(rows))
    basis = rows.new_zeros(num_steps + 1, len(rows))
    images = torch.zeros_like(basis)
    basis[0] = _start_direction(rows)
    found: list[Tensor] = []
    for k in range(1, num_steps + 1):
        # Vectors are scaled instead of the matrix: nothing large is copied.
        images[k - 1] = torch.mv(rows, torch.mv(rows.mT, basis[k - 1] / norm) / norm)
        if k % STEPS_BETWEEN_CHECKS == 0 or k == num_steps:
            found.append(eigenvalues(basis[:k] @ images[:k].mT)[-1])
            if _has_converged(found, k, rtol):
                break
        basis[k] = _next_direction(images[k - 1, :, None], basis[:k].mT)[:, 0]
    # σ₁ is never above the Frobenius norm; only rounding is.
    return found[-1].clamp(0.0, 1.0)


def _has_converged(found: list[Tensor], num_steps: int, rtol: float) -> bool:
    if len(found) <= GROWTH_OVER:
        return False
    # If what is missing falls as 1/k², it is k/2p times the growth over the last p steps.
    growth = found[-1] - found[-1 - GROWTH_OVER]
    missing = growth * num_steps / (2 * GROWTH_OVER * STEPS_BETWEEN_CHECKS)
    return bool(missing <= rtol * found[-1])
