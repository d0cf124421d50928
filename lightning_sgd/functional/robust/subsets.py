r"""Best subsets of rows: of the smallest diameter, and of the smallest top eigenvalue of the covariance.

Smallest diameter, exactly and without looking at all subsets: among n points there are n − f no farther than r from
each other exactly if the graph of the pairs that are farther apart has a vertex cover of at most f points, namely the
others. So r is found by bisection among the distances, and each question is answered by a search tree on the cover: of
any point either it is in the cover, or all its neighbours are.

Smallest top eigenvalue: all subsets are looked at, but few need a decomposition. The eigenvalues of a covariance A lie
between 0 and the top one λ, so :math:`\lVert A \rVert_F^2 \le \lambda \operatorname{tr} A`; subsets whose bound is
above the best λ so far are passed over.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

_CHUNK = 4096
_BATCH = 128


def smallest_diameter_subset(distances: Tensor, size: int) -> list[int]:
    """Find the ``size`` points whose largest distance from each other is smallest.

    Args:
        distances: Distances of the points, or an increasing function of them, of shape (n, n).
        size: Number of points to choose.

    Example:
        >>> import torch
        >>> points = torch.tensor([0.0, 1.0, 1.5, 7.0, 2.0])
        >>> smallest_diameter_subset((points[:, None] - points).abs(), 3)
        [1, 2, 4]
    """
    n = len(distances)
    rows, totals = distances.tolist(), distances.sum(dim=1).tolist()
    radii = sorted({0.0, *(rows[i][j] for i in range(n) for j in range(i))})
    # Sets of points are the bits of whole numbers: the search makes many of them, and unions are single operations.
    low, high, cover = 0, len(radii) - 1, 0
    while low < high:
        middle = (low + high) // 2
        found = _cover(_farther_than(rows, radii[middle]), (1 << n) - 1, n - size, totals)
        low, high, cover = (middle + 1, high, cover) if found is None else (low, middle, found)
    kept = [i for i in range(n) if not cover >> i & 1]
    by_distance = sorted(kept, key=lambda i: (totals[i], i))
    return sorted(by_distance[:size])


def smallest_covariance_subset(gram: Tensor, size: int) -> list[int]:
    r"""Find the ``size`` rows whose covariance has the smallest top eigenvalue.

    Args:
        gram: Inner products of the rows, of shape (n, n), whatever was subtracted from them.
        size: Number of rows to choose.

    Example:
        >>> rows = torch.tensor([[0.0], [1.0], [1.5], [7.0]])
        >>> smallest_covariance_subset(rows @ rows.T, 2)
        [1, 2]
    """
    best, chosen = torch.inf, list(range(size))
    for subsets in _chunks(len(gram), size):
        covariances = _centred(gram[subsets[:, :, None], subsets[:, None, :]])
        bounds = _lower_bounds(covariances)
        for batch in torch.split(bounds.argsort(stable=True), _BATCH):
            if float(bounds[batch[0]]) >= best:
                break
            tops = torch.linalg.eigvalsh(covariances[batch])[:, -1]
            index = int(tops.argmin())
            if float(tops[index]) < best:
                best, chosen = float(tops[index]), subsets[batch[index]].tolist()
    return chosen


def _farther_than(rows: list[list[float]], radius: float) -> list[int]:
    """Return, for each point, the points farther away than the radius as the bits of a number."""
    return [sum(1 << j for j, distance in enumerate(row) if distance > radius) for row in rows]


def _cover(far: Sequence[int], alive: int, budget: int, totals: Sequence[float]) -> int | None:
    """Find at most ``budget`` points of which every pair that is far apart has one, as bits; ``None`` if impossible.

    Ties are broken by the sum of distances, not by number, so that the subset prefers points near the others.
    """
    degrees = {i: (far[i] & alive).bit_count() for i in range(len(far)) if alive >> i & 1}
    if not any(degrees.values()):
        return 0
    chosen = max(degrees, key=lambda i: (degrees[i], totals[i]))
    # No point covers more pairs than this one: the budget cannot cover all, and the search is cut here.
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


def _chunks(num_rows: int, size: int) -> Iterator[Tensor]:
    subsets = itertools.combinations(range(num_rows), size)
    while chunk := list(itertools.islice(subsets, _CHUNK)):
        yield torch.tensor(chunk)


def _centred(grams: Tensor) -> Tensor:
    rows, columns = grams.mean(dim=-1, keepdim=True), grams.mean(dim=-2, keepdim=True)
    return grams - rows - columns + rows.mean(dim=-2, keepdim=True)


def _lower_bounds(covariances: Tensor) -> Tensor:
    traces = covariances.diagonal(dim1=-2, dim2=-1).sum(dim=-1)
    squares = covariances.square().sum(dim=(-2, -1))
    # Rounded down a little, so that no subset is passed over because of its last digit.
    return torch.where(traces > 0, squares / traces, 0.0) * (1 - 1e-12)
