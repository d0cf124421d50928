"""Subsets of smallest diameter, exactly and without looking at all subsets.

Among n points there are n − f no farther than r from each other exactly if the graph of the pairs that are farther
apart has a vertex cover of at most f points: remove these. So r is found by bisection among the distances, and each
question is answered by a search tree on the cover: of any point either it is in the cover, or all its neighbours are.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def smallest_diameter_subset(distances: Tensor, size: int) -> list[int]:
    """Numbers of the ``size`` points whose largest distance from each other is smallest.

    Args:
        distances: Distances of the points, or an increasing function of them, of shape (n, n).
        size: How many points to choose.

    Example:
        >>> import torch
        >>> points = torch.tensor([0.0, 1.0, 1.5, 7.0, 2.0])
        >>> smallest_diameter_subset((points[:, None] - points).abs(), 3)
        [1, 2, 4]
    """
    n = len(distances)
    rows, totals = distances.tolist(), distances.sum(dim=1).tolist()
    radii = sorted({0.0, *(rows[i][j] for i in range(n) for j in range(i))})
    low, high, cover = 0, len(radii) - 1, 0
    while low < high:
        middle = (low + high) // 2
        found = _cover(_farther_than(rows, radii[middle]), (1 << n) - 1, n - size, totals)
        low, high, cover = (middle + 1, high, cover) if found is None else (low, middle, found)
    kept = [i for i in range(n) if not cover >> i & 1]
    by_distance = sorted(kept, key=lambda i: (totals[i], i))
    return sorted(by_distance[:size])


def _farther_than(rows: list[list[float]], radius: float) -> list[int]:
    """For each point those that are farther away than the radius, as the bits of a number."""
    return [sum(1 << j for j, distance in enumerate(row) if distance > radius) for row in rows]


def _cover(far: Sequence[int], alive: int, budget: int, totals: Sequence[float]) -> int | None:
    """Points among those alive, no more than the budget, that every pair has one of; as bits. None if there are none.

    Where there is a choice, it falls on the point that is farther from all others, not on the one of lower number.
    """
    degrees = {i: (far[i] & alive).bit_count() for i in range(len(far)) if alive >> i & 1}
    if not any(degrees.values()):
        return 0
    chosen = max(degrees, key=lambda i: (degrees[i], totals[i]))
    if sum(degrees.values()) > 2 * budget * degrees[chosen]:
        return None
    leaves = [i for i, degree in degrees.items() if degree == 1]
    if leaves:  # the neighbour of a leaf covers at least what the leaf covers
        inner = max((_lowest(far[i] & alive) for i in leaves), key=lambda i: totals[i])
        return _with(1 << inner, far, alive, budget, totals)
    cover = _with(1 << chosen, far, alive, budget, totals)
    return _with(far[chosen] & alive, far, alive, budget, totals) if cover is None else cover


def _with(
    points: int, far: Sequence[int], alive: int, budget: int, totals: Sequence[float]
) -> int | None:
    left = budget - points.bit_count()
    rest = _cover(far, alive & ~points, left, totals) if left >= 0 else None
    return None if rest is None else rest | points


def _lowest(bits: int) -> int:
    return (bits & -bits).bit_length() - 1
