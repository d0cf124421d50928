"""Gram matrices of many matrices, and functions of them in batches."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor

from lightning_sgd._validation import expect


def gram_singular_values(grams: Tensor) -> Tensor:
    r"""Compute the singular values of W from :math:`WW^\top`, descending; NaN where the Gram matrix is not finite.

    Args:
        grams: Symmetric positive semi-definite matrices of shape (…, m, m).

    Returns:
        Tensor of shape (…, m).

    Example:
        >>> gram_singular_values(torch.tensor([[9.0, 0.0], [0.0, 16.0]]))
        tensor([4., 3.])
    """
    # Rounding can make eigenvalues of zero negative; and `eigvalsh` returns them ascending.
    return where_finite(eigenvalues, grams).clamp_min(0.0).sqrt().flip(-1)


def gram_matrix(rows: Tensor) -> Tensor:
    r"""Compute :math:`WW^\top`; of large matrices only one half, by symmetry.

    Args:
        rows: Matrices W of shape (…, m, n).

    Example:
        >>> gram_matrix(torch.tensor([[3.0, 0.0], [0.0, 4.0]]))
        tensor([[ 9.,  0.],
                [ 0., 16.]])
    """
    # For small matrices the calls cost more than half of the product saves.
    if rows.shape[-2] < 256:
        return rows @ rows.mT
    above, below = rows.tensor_split(2, dim=-2)
    corner = below @ above.mT
    upper = torch.cat([gram_matrix(above), corner.mT], dim=-1)
    return torch.cat([upper, torch.cat([corner, gram_matrix(below)], dim=-1)], dim=-2)


def eigenvalues(matrices: Tensor) -> Tensor:
    """Compute the eigenvalues of symmetric matrices, ascending."""
    values: Tensor = torch.linalg.eigvalsh(matrices)
    return values


def where_finite(function: Callable[[Tensor], Tensor], matrices: Tensor) -> Tensor:
    """Apply a decomposition; NaN for matrices that are not finite, for which LAPACK would fail the whole batch."""
    finite = matrices.isfinite().flatten(-2).all(dim=-1, keepdim=True)
    values = function(torch.where(finite[..., None], matrices, 0.0))
    return torch.where(finite, values, torch.nan)


def normalize(matrix: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scale the largest element to one; return the matrix and the scale, which has a last dimension of size 1."""
    # Scaled to at most 1, squares cannot overflow, and that of the largest element cannot vanish.
    wide = as_wide(matrix, dtype)
    scale = _largest_magnitude(wide)
    # A zero matrix stays zero. NaN is not above 0 either, and stays in the matrix.
    return wide / torch.where(scale > 0, scale, 1.0)[..., None], scale


def as_wide(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """Check the matrix and convert it to the wider of its own type and ``dtype``."""
    # Called for every matrix at every look, and the sentences are needed only where something is wrong.
    if matrix.is_complex() or matrix.ndim < 2 or matrix.numel() == 0:
        _refuse(matrix)
    if matrix.device.type == "mps":  # has neither float64 nor eigenvalues
        matrix = matrix.cpu()
    return matrix.detach().to(torch.promote_types(matrix.dtype, dtype))


def _refuse(matrix: Tensor) -> None:
    remedy = "Leave it out."
    expect(not matrix.is_complex(), "matrices", "real", matrix.dtype, remedy)
    expect(matrix.ndim >= 2, "matrices", "of shape (…, m, n)", tuple(matrix.shape), remedy)
    expect(matrix.numel() > 0, "matrices", "not empty", tuple(matrix.shape), remedy)


def _largest_magnitude(matrix: Tensor) -> Tensor:
    if matrix.ndim == 2:  # ten times as fast as along a dimension
        low, high = matrix.aminmax()
        return torch.maximum(high, -low)[None]
    low, high = matrix.flatten(-2).aminmax(dim=-1, keepdim=True)
    return torch.maximum(high, -low)


class GramQueue:
    """A queue that decomposes Gram matrices of equal size together.

    Args:
        of_batch: Function from Gram matrices (b, m, m) to a vector for each, (b, k).
        max_elements: Apply it whenever so many elements of one size have been collected.

    Attributes:
        results: For each index, the vectors of its matrix, of shape (…, k).
    """

    def __init__(self, of_batch: Callable[[Tensor], Tensor], max_elements: int) -> None:
        self.of_batch, self.max_elements = of_batch, max_elements
        self.waiting: dict[object, dict[int, Tensor]] = defaultdict(dict)
        self.results: dict[int, Tensor] = {}

    def put(self, index: int, matrix: Tensor) -> None:
        """Add the Gram matrix, on its short side, of the matrix with this index."""
        short = matrix if matrix.shape[-2] <= matrix.shape[-1] else matrix.mT
        gram = gram_matrix(short)
        # Matrices of one short side share a batch, whatever their long sides.
        key = gram.device, gram.dtype, gram.shape[-1]
        self.waiting[key][index] = gram
        if sum(other.numel() for other in self.waiting[key].values()) >= self.max_elements:
            self._solve(key)

    def finish(self) -> list[Tensor]:
        """Decompose the remaining matrices and return all results in order."""
        for key in list(self.waiting):
            self._solve(key)
        return [self.results[index] for index in range(len(self.results))]

    def _solve(self, key: object) -> None:
        waiting = self.waiting.pop(key)
        flat = [gram.reshape(-1, *gram.shape[-2:]) for gram in waiting.values()]
        grams = torch.cat(flat)
        # One entry of the queue may itself be a batch of matrices and above the limit.
        chunk = max(1, self.max_elements // grams[0].numel())
        values = torch.cat([self.of_batch(part) for part in torch.split(grams, chunk)])
        sizes = [len(part) for part in flat]
        for (index, gram), result in zip(waiting.items(), torch.split(values, sizes), strict=True):
            self.results[index] = result.reshape(*gram.shape[:-2], -1)
