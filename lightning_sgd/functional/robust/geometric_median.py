r"""The point with the smallest sum of distances to the rows, as weights on the rows.

Every iterate of Weiszfeld's algorithm is a combination :math:`z = X^\top a` of the rows, and
:math:`\lVert x_i - z \rVert^2 = G_{ii} - 2 (Ga)_i + a^\top G a`: n numbers stand for a vector of any length.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_sgd.functional.robust.stacked_rows import squared_distances

# Its square is still above the smallest number in double precision.
_TINY = 1e-150


def distances_from(gram: Tensor, a: Tensor) -> Tensor:
    """Compute the distance of each row from a combination of the rows, of shape (n,).

    Args:
        gram: Inner products of shape (n, n).
        a: Coefficients of shape (n,); unless they sum to one, the rows must not have been shifted.

    Example:
        >>> distances_from(torch.tensor([[0.0, 0.0], [0.0, 4.0]]), torch.tensor([0.5, 0.5]))
        tensor([1., 1.])
    """
    inner = gram @ a
    return (gram.diagonal() - 2 * inner + a @ inner).clamp_min(0.0).sqrt()


def weiszfeld(
    gram: Tensor,
    masses: Tensor,
    start: Tensor,
    num_iterations: int,
    smoothing: float,
    tolerance: float,
) -> Tensor:
    """Run the smoothed Weiszfeld algorithm and return the weights, of shape (n,).

    Args:
        gram: Inner products of the rows, of shape (n, n).
        masses: Weight of each row's distance in the sum, of shape (n,).
        start: Coefficients of the point to start at, of shape (n,).
        num_iterations: Largest number of steps.
        smoothing: Smaller distances are replaced by this [ν].
        tolerance: Stop when no weight changes by more than this.

    Example:
        >>> gram = torch.tensor([[0.0, 0.0], [0.0, 4.0]])
        >>> weiszfeld(gram, torch.ones(2), torch.tensor([0.5, 0.5]), 3, 1e-6, 1e-9)
        tensor([0.5000, 0.5000])
    """
    a = start
    for _ in range(num_iterations):
        # Without smoothing a step that comes to a row would stay there: its pull is infinite.
        pull = masses / distances_from(gram, a).clamp_min(max(smoothing, _TINY))
        previous, a = a, pull / pull.sum()
        if float((a - previous).abs().max()) <= tolerance:
            break
    return a


def median_among_rows(gram: Tensor, masses: Tensor) -> int | None:
    r"""Find the row that is the geometric median, at which Weiszfeld's algorithm would divide by zero.

    Row k is the median if the sum of the unit vectors from it to all other rows, times their masses, is no longer than
    the mass at its own position.

    Args:
        gram: Inner products of the rows, of shape (n, n).
        masses: Weight of each row's distance in the sum, of shape (n,).

    Example:
        >>> points = torch.tensor([[0.0], [1.0], [9.0]])
        >>> median_among_rows(points @ points.T, torch.ones(3))
        1
    """
    squares = squared_distances(gram)
    scale = gram.diagonal()
    # Rows closer than rounding are at the same position: their direction from each other is noise.
    apart = squares > 1e-13 * (scale[:, None] + scale)
    pulls = torch.where(apart, masses[:, None] / squares.sqrt().clamp_min(_TINY), 0.0)
    totals, images = pulls.sum(dim=0), gram @ pulls
    # ‖Σᵢ pᵢ(xᵢ − x_k)‖² for every k, by inner products alone.
    lengths = (pulls * images).sum(dim=0) - 2 * totals * images.diagonal() + totals**2 * scale
    own = (masses[:, None] * ~apart).sum(dim=0)
    # The optimality condition at row k: zero is a subgradient of the sum of distances there.
    excess = lengths.clamp_min(0.0).sqrt() - own
    k = int(excess.argsort(stable=True)[0])
    return k if float(excess[k]) <= 1e-9 * float(masses.sum()) else None
