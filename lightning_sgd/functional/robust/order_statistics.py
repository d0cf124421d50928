r"""Order statistics of the columns of a few rows, and means of what is near them.

The k values of a sorted column that are nearest to a centre are neighbours, so they hold exactly one of every k-th
value: of :math:`x_{(j)}, x_{(j+k)}, x_{(j+2k)}, \dots` the nearest one, for each j < k. Nothing has to be sorted by
distance.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_sgd.functional.robust.sorting_network import partially_sort


def column_median(block: Tensor) -> Tensor:
    """Median of each column, the mean of the two in the middle where there are two.

    Args:
        block: Finite numbers of shape (n, s).

    Example:
        >>> column_median(torch.tensor([[1.0], [2.0], [5.0], [90.0]]))
        tensor([3.5000])
    """
    num_outside = (len(block) - 1) // 2
    return trimmed_mean(block, num_outside)


def trimmed_mean(block: Tensor, num_trimmed: int) -> Tensor:
    """Mean of each column without its smallest and largest values.

    Args:
        block: Finite numbers of shape (n, s).
        num_trimmed: How many values are cut at either end [f], fewer than n/2.

    Example:
        >>> trimmed_mean(torch.tensor([[1.0], [2.0], [4.0], [90.0]]), 1)
        tensor([3.])
    """
    n = len(block)
    if num_trimmed == 0:
        return block.mean(dim=0)
    groups = [None] * num_trimmed + ["middle"] * (n - 2 * num_trimmed) + [None] * num_trimmed
    rows = partially_sort(block, groups)
    return _mean(rows[num_trimmed : n - num_trimmed])


def mean_near_median(block: Tensor, num_far: int) -> Tensor:
    """Mean of each column without the values that are farthest from its median.

    Args:
        block: Finite numbers of shape (n, s).
        num_far: How many values are left out, fewer than n.

    Example:
        >>> mean_near_median(torch.tensor([[1.0], [2.0], [4.0], [90.0]]), 1)
        tensor([2.3333])
    """
    n = len(block)
    if num_far == 0:
        return block.mean(dim=0)
    middle = (n - 1) // 2
    # The median is held by places that may lie inside the window's sure part: they need an order of their own.
    rows = partially_sort(block, _groups(n, num_far, (middle, n - 1 - middle)))
    return _mean_near(rows, _mean([rows[middle], rows[n - 1 - middle]]), num_far)


def mean_near_trimmed_mean(block: Tensor, num_far: int) -> Tensor:
    """Mean of each column without the values that are farthest from its trimmed mean.

    Args:
        block: Finite numbers of shape (n, s).
        num_far: How many values are cut at either end for the trimmed mean, and how many are left out [f].

    Example:
        >>> mean_near_trimmed_mean(torch.tensor([[1.0], [2.0], [4.0], [90.0]]), 1)
        tensor([2.3333])
    """
    n = len(block)
    if num_far == 0:
        return block.mean(dim=0)
    rows = partially_sort(block, _groups(n, num_far, ()))
    return _mean_near(rows, _mean(rows[num_far : n - num_far]), num_far)


def _groups(n: int, num_far: int, single: Sequence[int]) -> list[object]:
    """Of what is surely near the order does not matter, unless it is asked for."""
    is_sure = [num_far <= place < n - num_far and place not in single for place in range(n)]
    return ["sure" if sure else place for place, sure in enumerate(is_sure)]


def _mean_near(rows: list[Tensor], centre: Tensor, num_far: int) -> Tensor:
    """Mean of all but the ``num_far`` farthest from the centre, of columns sorted but for what is surely near."""
    num_near = len(rows) - num_far
    total = torch.zeros_like(centre)
    for start in range(num_near):
        nearest = rows[start]
        for row in rows[start + num_near :: num_near]:
            nearest = torch.where(row - centre < centre - nearest, row, nearest)
        total += nearest
    return total.div_(num_near)


def _mean(rows: list[Tensor]) -> Tensor:
    total = rows[0].clone()
    for row in rows[1:]:
        total += row
    return total.div_(len(rows))
