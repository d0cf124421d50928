r"""Order statistics of the columns of a few rows, and means of the values near them, by sorting networks.

``torch.sort`` along a short dimension is slow and returns indices that are not needed. A sorting network compares fixed
pairs of rows, so each comparison is two elementwise operations on whole rows. Comparisons whose outcome is not needed
are left out: the median alone needs no complete sort, nor does the sum of the middle values.

The k values of a sorted column that are nearest to a centre are neighbours, so they hold exactly one of every k-th
value: of :math:`x_{(j)}, x_{(j+k)}, x_{(j+2k)}, \dots` the nearest one, for each j < k. Nothing has to be sorted by
distance.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor


def column_median(block: Tensor) -> Tensor:
    """Compute the median of each column; of an even number the mean of the two middle values.

    Args:
        block: Finite numbers of shape (n, s).

    Example:
        >>> column_median(torch.tensor([[1.0], [2.0], [5.0], [90.0]]))
        tensor([3.5000])
    """
    num_outside = (len(block) - 1) // 2
    return trimmed_mean(block, num_outside)


def trimmed_mean(block: Tensor, num_trimmed: int) -> Tensor:
    """Compute the mean of each column without its smallest and largest values.

    Args:
        block: Finite numbers of shape (n, s).
        num_trimmed: Number of values cut at either end [f], fewer than n/2.

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
    """Compute the mean of each column without the values farthest from its median.

    Args:
        block: Finite numbers of shape (n, s).
        num_far: Number of values left out, fewer than n.

    Example:
        >>> mean_near_median(torch.tensor([[1.0], [2.0], [4.0], [90.0]]), 1)
        tensor([2.3333])
    """
    n = len(block)
    if num_far == 0:
        return block.mean(dim=0)
    middle = (n - 1) // 2
    # The median may lie among the values that are kept in any case: its places have to be sorted nevertheless.
    rows = partially_sort(block, _groups(n, num_far, (middle, n - 1 - middle)))
    return _mean_near(rows, _mean([rows[middle], rows[n - 1 - middle]]), num_far)


def mean_near_trimmed_mean(block: Tensor, num_far: int) -> Tensor:
    """Compute the mean of each column without the values farthest from its trimmed mean.

    Args:
        block: Finite numbers of shape (n, s).
        num_far: Number of values cut at either end for the trimmed mean, and number of values left out [f].

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
    """Group the places that are kept in any case, whose order does not matter, except for the places in ``single``."""
    is_sure = [num_far <= place < n - num_far and place not in single for place in range(n)]
    return ["sure" if sure else place for place, sure in enumerate(is_sure)]


def _mean_near(rows: list[Tensor], centre: Tensor, num_far: int) -> Tensor:
    """Average all but the ``num_far`` values farthest from the centre, of columns sorted as :func:`_groups` asks."""
    num_near = len(rows) - num_far
    total = torch.zeros_like(centre)
    # The values nearest to the centre are neighbours, so each residue class of places holds exactly one of them.
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


@dataclass(frozen=True, slots=True)
class Comparator:
    """A comparison that puts the smaller of two values at ``low`` and the larger at ``high``.

    Attributes:
        low: Place of the smaller value.
        high: Place of the larger value.
        keeps_low: Whether the smaller value is needed.
        keeps_high: Whether the larger value is needed.
    """

    low: int
    high: int
    keeps_low: bool = True
    keeps_high: bool = True


def odd_even_merge_sort(size: int) -> list[tuple[int, int]]:
    """List pairs of places that sort any values if each pair, in this order, is put in order.

    Args:
        size: Number of values [n]; O(n log² n) pairs sort them.

    Example:
        >>> odd_even_merge_sort(4)
        [(0, 2), (1, 3), (0, 1), (2, 3), (1, 2)]

    Reference:
        K. E. Batcher. Sorting networks and their applications. AFIPS 1968; in the form for any n of D. E. Knuth, The
        Art of Computer Programming, section 5.2.2, algorithm M.
    """
    pairs: list[tuple[int, int]] = []
    largest = 1 << (size - 1).bit_length() >> 1
    p = largest
    while p > 0:
        q, r, distance = largest, 0, p
        while True:
            pairs += [(i, i + distance) for i in range(size - distance) if i & p == r]
            if q == p:
                break
            distance, q, r = q - p, q >> 1, p
        p >>= 1
    return pairs


@lru_cache(maxsize=64)
def network(groups: tuple[Hashable, ...]) -> tuple[Comparator, ...]:
    """List the comparisons after which every group of places holds its values.

    Args:
        groups: For each place, counted from the smallest value, the name of its group, or ``None`` if it is not needed.
            Within a group values may be in any order; a place alone in its group holds its order statistic.

    Example:
        >>> len(odd_even_merge_sort(9)), len(network((None,) * 4 + ("median",) + (None,) * 4))
        (26, 22)
    """
    asked: list[Hashable] = list(groups)
    needed = []
    # Backwards from the result: a comparison is needed if its two outputs belong to different groups.
    for number, (low, high) in reversed(list(enumerate(odd_even_merge_sort(len(groups))))):
        if asked[low] == asked[high]:
            continue  # the order within a group, or of places that are not needed, does not matter
        needed.append(Comparator(low, high, asked[low] is not None, asked[high] is not None))
        asked[low] = asked[high] = ("inputs of", number)
    return tuple(reversed(needed))


def partially_sort(block: Tensor, groups: Sequence[Hashable]) -> list[Tensor]:
    """Sort every column as far as the groups need it.

    Args:
        block: Numbers of shape (n, s), none of them NaN; they are not changed.
        groups: As for :func:`network`.

    Returns:
        The n rows; those that are not needed hold arbitrary values.

    Example:
        >>> low, _, high = partially_sort(torch.tensor([[3.0], [1.0], [2.0]]), ("min", None, "max"))
        >>> float(low), float(high)
        (1.0, 3.0)
    """
    rows, spare = list(block.clone().unbind()), torch.empty_like(block[0])
    for step in network(tuple(groups)):
        a, b = rows[step.low], rows[step.high]
        if step.keeps_low and step.keeps_high:
            # Into the spare row, because the maximum still needs both; the freed row is the next spare one.
            torch.minimum(a, b, out=spare)
            torch.maximum(a, b, out=b)
            rows[step.low], spare = spare, a
        elif step.keeps_low:
            torch.minimum(a, b, out=a)
        else:
            torch.maximum(a, b, out=b)
    return rows
