"""Combine the values of several ranks so that a few wrong ones do not matter."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

BLOCK = 2**18
"""Columns at a time."""

Value = TypeVar("Value", bound=Hashable)


def finite_median(rows: Tensor) -> Tensor:
    """Compute the median of the finite numbers of each column; of an even number the mean of the two middle ones.

    Args:
        rows: Values of each rank, of shape (n, …).

    Returns:
        Tensor of shape (…), NaN where no number is finite.

    Example:
        >>> finite_median(torch.tensor([[1.0, 1.0], [2.0, torch.nan], [4.0, 5.0], [torch.inf, 9.0]]))
        tensor([2., 5.])
    """
    flat = rows.reshape(len(rows), -1)
    flat = flat.where(flat.isfinite(), torch.nan)
    # `nanquantile` refuses more than 2²⁴ numbers at once.
    parts = [part.nanquantile(0.5, dim=0) for part in torch.split(flat, BLOCK, dim=1)]
    return torch.cat(parts).view(rows.shape[1:])


def most_frequent(rows: Tensor) -> Tensor:
    """Return the most frequent value of each column, of equally frequent ones the smallest.

    Args:
        rows: Integers of each rank, of shape (n, …).

    Example:
        >>> most_frequent(torch.tensor([[3, 1], [3, 2], [9, 3]]))
        tensor([3, 1])
    """
    values: Tensor = rows.mode(dim=0).values
    return values


def is_majority(votes: Sequence[bool]) -> bool:
    """Return whether more than half of the votes are true.

    Args:
        votes: One vote per rank.

    Example:
        >>> is_majority([True, True, False]), is_majority([True, False])
        (True, False)
    """
    return 2 * sum(votes) > len(votes)


def majority(values: Sequence[Value]) -> Value | None:
    """Return the value of more than half of the ranks; ``None`` if there is none.

    Args:
        values: One value per rank.

    Example:
        >>> majority(["a", "b", "a"]), majority(["a", "b"])
        ('a', None)
    """
    value, count = Counter(values).most_common(1)[0]
    return value if 2 * count > len(values) else None


def worker_momentum(momentum: Tensor, gradient: Tensor, beta: float) -> Tensor:
    r"""Advance each worker's momentum in place, :math:`m \leftarrow \beta m + (1 - \beta) g`, and return it.

    A gradient that is not finite does not change the momentum of its worker, and is returned in its place: otherwise a
    single overflow would stay in the momentum forever.

    Args:
        momentum: Momenta of shape (k, d).
        gradient: Gradients of the same shape.
        beta: Share of the past [β].

    Example:
        >>> momentum = torch.tensor([[1.0], [1.0]])
        >>> worker_momentum(momentum, torch.tensor([[2.0], [torch.inf]]), beta=0.9)
        tensor([[1.1000],
                [   inf]])
        >>> momentum
        tensor([[1.1000],
                [1.0000]])
    """
    # Row by row, so that no mask of the size of all gradients is made.
    finite = torch.stack([row.isfinite().all() for row in gradient])[:, None]
    if bool(finite.all()):
        return momentum.lerp_(gradient, 1 - beta)
    momentum.copy_(torch.where(finite, momentum.lerp(gradient, 1 - beta), momentum))
    return torch.where(finite, momentum, gradient)
