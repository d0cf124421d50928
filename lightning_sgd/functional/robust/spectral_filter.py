r"""The spectral filter of byzantine-resilient SGD, on the Gram matrix of the workers' gradients.

An outlier that moves the mean of n vectors of length d must increase the top eigenvalue of their covariance. With
weights p and rows centred at their weighted mean, :math:`Y = (I - 1p^\top)X`, the d × d covariance
:math:`Y^\top D Y`, D = diag(p), has the non-zero eigenvalues of the n × n matrix :math:`D^{1/2} K D^{1/2}`, where

.. math:: K = YY^\top = (I - 1p^\top)\, G\, (I - p1^\top), \qquad G = XX^\top .

For its top eigenpair (λ, u), the squared projections of the centred rows on the top direction of the covariance are
:math:`\tau_i = (K D^{1/2} u)_i^2 / \lambda`, with :math:`\sum_i p_i \tau_i = \lambda`. The filter multiplies the mass
of row i by :math:`1 - \tau_i / \max_j \tau_j` until λ is small: at least one row loses all of it in every pass, and as
long as faulty rows hold more than half of λ, they lose more mass than the others.

Why a small λ is enough: two distributions whose covariances have top eigenvalues λ and λ', and whose total variation
distance is δ, have means no farther apart than :math:`(\sqrt\lambda + \sqrt{\lambda'}) \sqrt{\delta/(1 - \delta)}`.
There is no d in it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_sgd.functional.robust.stacked_rows import squared_distances

_LARGEST_DENSE = 256
"""Up to this size a full eigendecomposition is fast enough; beyond it, the power iteration is used."""


@dataclass(frozen=True, slots=True)
class FilterResult:
    """Result of the spectral filter.

    Attributes:
        weights: Weight of each row, of shape (n,); they sum to one.
        top_eigenvalue: Largest eigenvalue of the covariance under these weights [λ].
        num_passes: Number of eigenproblems solved, at most n.
    """

    weights: Tensor
    top_eigenvalue: float
    num_passes: int


@dataclass(frozen=True, slots=True)
class Spread:
    """Largest spread of the rows under weights.

    Attributes:
        top_eigenvalue: Largest eigenvalue of the weighted covariance [λ].
        projections: Squared projections of the centred rows on its direction, of shape (n,) [τ].
    """

    top_eigenvalue: float
    projections: Tensor


def spectral_filter(
    gram: Tensor,
    num_byzantine: int,
    floor: float | None,
    *,
    masses: Tensor | None = None,
    uniform: Callable[[], float] | None = None,
) -> FilterResult:
    """Compute weights under which the covariance of the rows has no large eigenvalue.

    Args:
        gram: Inner products of the rows, of shape (n, n) in double precision, whatever was subtracted from them.
        num_byzantine: How many rows may be faulty [f]. Faulty rows lose more mass than the others while they hold more
            than half of λ, so weights under which more than 2f/n of the mass is gone are never taken.
        floor: Stop at a top eigenvalue no larger than this. Without it, or if it is not reached, the weights are
            returned under which the top eigenvalue was smallest.
        masses: Mass of each row at the start [c], equal by default.
        uniform: Draws U from [0, 1): rows with τ > U·max τ lose all their mass at once, the others nothing. By
            default mass is removed in proportion to τ.

    Example:
        >>> rows = torch.tensor([[0.0], [1.0], [2.0], [3.0], [100.0]], dtype=torch.float64)
        >>> spectral_filter(rows @ rows.T, 1, floor=2.0).weights[-1]
        tensor(0., dtype=torch.float64)
    """
    n = len(gram)
    c = torch.ones(n, dtype=gram.dtype) if masses is None else n * masses / masses.sum()
    least_mass = (n - 2 * num_byzantine) * (
        1 - 1e-12
    )  # rounding must not end the loop one pass early
    best: FilterResult | None = None
    num_passes = 0
    # The present weights are judged before the mass is; byzfl's loop ends first, and misses the last weights.
    while best is None or float(c.sum()) >= least_mass:
        num_passes += 1
        p = c / c.sum()
        spread = largest_spread(gram, p)
        if best is None or spread.top_eigenvalue < best.top_eigenvalue:
            best = FilterResult(p, spread.top_eigenvalue, num_passes)
        if _is_done(spread, gram, floor):
            break
        c = _remove_mass(c, spread.projections, uniform)
    return replace(best, num_passes=num_passes)


def _is_done(spread: Spread, gram: Tensor, floor: float | None) -> bool:
    rounding = 1e-20 * float(
        gram.diagonal().max()
    )  # equal rows: there is nothing to divide by max τ
    return spread.top_eigenvalue <= max(rounding, 0.0 if floor is None else floor)


def _remove_mass(c: Tensor, projections: Tensor, uniform: Callable[[], float] | None) -> Tensor:
    largest = projections.max()
    if uniform is None:
        return c * (1 - projections / largest)
    return c * (projections <= uniform() * largest)


def largest_spread(gram: Tensor, weights: Tensor) -> Spread:
    """Compute the top eigenvalue of the covariance of weighted rows, and the projections on its eigenvector.

    Args:
        gram: Inner products of the rows, of shape (n, n) in double precision.
        weights: Weight of each row, of shape (n,); they sum to one.

    Example:
        >>> rows = torch.tensor([[0.0], [2.0]], dtype=torch.float64)
        >>> largest_spread(rows @ rows.T, torch.tensor([0.5, 0.5], dtype=torch.float64)).projections
        tensor([1.0000, 1.0000], dtype=torch.float64)
    """
    g = gram @ weights
    # Any common shift of the rows cancels here, so the Gram matrix may be that of shifted rows.
    centred = gram - g[:, None] - g + weights @ g
    root = weights.sqrt()
    top, u = _top_eigenpair(root[:, None] * centred * root)
    # A row without mass cannot lose any, and must not be the maximum that the others are compared with.
    projections = torch.where(weights > 0, (centred @ (root * u)).square() / max(top, 1e-300), 0.0)
    return Spread(top, projections)


def _top_eigenpair(matrix: Tensor) -> tuple[float, Tensor]:
    if len(matrix) > _LARGEST_DENSE:
        return _power_iteration(matrix)
    # `eigh` reads one triangle only, and products are not exactly symmetric.
    values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
    return float(values[-1]), vectors[:, -1]


def _power_iteration(
    matrix: Tensor, min_steps: int = 30, max_steps: int = 1000
) -> tuple[float, Tensor]:
    """Iterate from the longest row, which is the same on every rank; one step from a random start is far off."""
    u = matrix[int(matrix.diagonal().argmax())].clone()
    previous = 0.0
    for step in range(max_steps):
        u = u / u.norm().clamp_min(1e-300)
        image = matrix @ u
        value = float(u @ image)
        if step >= min_steps and abs(value - previous) <= 1e-6 * abs(value):
            break
        u, previous = image, value
    return value, u / u.norm().clamp_min(1e-300)


def noise_floor(gram: Tensor, num_byzantine: int, largest_weight: float) -> float:
    """Estimate the top eigenvalue of the covariance if the rows differed by noise alone.

    In many dimensions noise of n rows is nearly orthogonal: all eigenvalues of the covariance are near tr(Σ)/n, and all
    squared distances near 2 tr(Σ). The estimate uses the distance of rank h/2 from below, where h is the number of
    pairs of honest rows: faulty rows cannot raise it above the median of the honest distances.

    Args:
        gram: Inner products of the rows, of shape (n, n) in double precision.
        num_byzantine: How many rows may be faulty [f].
        largest_weight: Largest weight of a row, 1/n if all are equal.

    Example:
        >>> noise_floor(torch.eye(4, dtype=torch.float64), 0, 0.25)
        0.25
    """
    n = len(gram)
    pairs = torch.triu_indices(n, n, offset=1)
    distances = squared_distances(gram)[pairs[0], pairs[1]].sort().values
    honest = n - num_byzantine
    num_pairs = max(1, honest * (honest - 1) // 2)
    middle = distances[(num_pairs - 1) // 2 : num_pairs // 2 + 1]
    # Half a squared distance is near tr(Σ).
    return largest_weight * float(middle.mean()) / 2 if len(middle) else 0.0
