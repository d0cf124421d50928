"""Sorting networks: many short columns sorted at once by elementwise minima and maxima.

``torch.sort`` along a short dimension is slow and makes indices that nobody needs. A network compares fixed pairs of
rows, so each comparison is two elementwise operations on whole rows. Comparisons whose outcome nobody asks for are
left out: who wants the median alone need not sort, nor does who wants the sum of what is in the middle.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Comparator:
    """Puts the smaller of two values at ``low`` and the larger at ``high``.

    Attributes:
        low: Place of the smaller value.
        high: Place of the larger value.
        keeps_low: Whether anybody needs the smaller one.
        keeps_high: Whether anybody needs the larger one.
    """

    low: int
    high: int
    keeps_low: bool = True
    keeps_high: bool = True


def odd_even_merge_sort(size: int) -> list[tuple[int, int]]:
    """Pairs of places that sort any values when the smaller goes to the first, in this order.

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
    """Comparisons after which every place holds what is asked for.

    Args:
        groups: For each place, counted from the smallest value, what is asked of it: ``None`` for nothing, else the
            name of a group. Within a group values may stand in any order; a place alone in its group holds its order
            statistic.

    Example:
        >>> len(odd_even_merge_sort(9)), len(network((None,) * 4 + ("median",) + (None,) * 4))
        (26, 22)
    """
    asked: list[Hashable] = list(groups)
    needed = []
    for number, (low, high) in reversed(list(enumerate(odd_even_merge_sort(len(groups))))):
        if asked[low] == asked[high]:
            continue  # the order within a group, or of what nobody asks for, does not matter
        needed.append(Comparator(low, high, asked[low] is not None, asked[high] is not None))
        asked[low] = asked[high] = ("inputs of", number)
    return tuple(reversed(needed))


def partially_sort(block: Tensor, groups: Sequence[Hashable]) -> list[Tensor]:
    """Rows in which every column stands in the order that is asked for.

    Args:
        block: Numbers of shape (n, s), none of them NaN; they are not changed.
        groups: As for :func:`network`.

    Returns:
        The n rows; those of which nothing was asked hold anything.

    Example:
        >>> low, _, high = partially_sort(torch.tensor([[3.0], [1.0], [2.0]]), ("min", None, "max"))
        >>> float(low), float(high)
        (1.0, 3.0)
    """
    rows, spare = list(block.clone().unbind()), torch.empty_like(block[0])
    for step in network(tuple(groups)):
        a, b = rows[step.low], rows[step.high]
        if step.keeps_low and step.keeps_high:
            torch.minimum(a, b, out=spare)
            torch.maximum(a, b, out=b)
            rows[step.low], spare = spare, a
        elif step.keeps_low:
            torch.minimum(a, b, out=a)
        else:
            torch.maximum(a, b, out=b)
    return rows
