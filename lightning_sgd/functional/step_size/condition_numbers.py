"""Condition numbers of a least-squares problem, estimated from its features."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_sgd._validation import Words, expect


@dataclass(frozen=True, slots=True)
class ConditionNumbers:
    """What the convergence of SGD and MaSS on interpolated least squares depends on.

    Attributes:
        L: Largest eigenvalue of H = E[xxᵀ].
        L1: Smallest number with E[‖x‖²xxᵀ] ⪯ L1·H.
        mu: Smallest non-zero eigenvalue of H [μ].
        kappa_tilde: Smallest number with E[⟨x, H⁺x⟩xxᵀ] ⪯ κ̃·H, the statistical condition number [κ̃].
    """

    L: float
    L1: float
    mu: float
    kappa_tilde: float

    @property
    def kappa(self) -> float:
        """The condition number of H [κ = L/μ]."""
        return self.L / self.mu


def estimate_condition_numbers(
    features: Tensor | Iterable[Any],
    *,
    feature_map: Callable[[Any], Tensor] | None = None,
    num_samples: int = 4096,
    rtol: float | None = None,
) -> ConditionNumbers:
    r"""Exact condition numbers of the empirical distribution of some features.

    One thin singular value decomposition :math:`X = U S V^\top` of the (n, d) features gives everything: with
    :math:`u_i` the rows of :math:`U`,

    .. math::
        H = V \tfrac{S^2}{n} V^\top, \quad
        L_1 = \lambda_{\max}\Big(\sum_i \|x_i\|^2 u_i u_i^\top\Big), \quad
        \tilde\kappa = \lambda_{\max}\Big(n \sum_i \|u_i\|^2 u_i u_i^\top\Big).

    The estimate of κ̃ from n samples is at most n, and exactly n when the samples are linearly independent (d ≥ n):
    a pessimistic value. For a network take few features (its last hidden layer), or treat κ̃ as a knob.

    Cost: O(n·d·min(n, d)) time and O(n·d) memory in float64, with n at most ``num_samples``.

    Args:
        features: Tensor of shape (n, …), flattened to (n, d), or an iterable of batches such as a DataLoader.
        feature_map: Turns a batch into a tensor of shape (n, …); by default a batch is the tensor itself, the first
            entry of a tuple or list, or the first value of a mapping.
        num_samples: How many samples to read from an iterable at most.
        rtol: Singular values below this fraction of the largest count as zero; by default max(n, d) times the
            machine epsilon of the features' type.

    Returns:
        The condition numbers.

    Raises:
        ValueError: If there are no samples, or all are zero, or some are not finite.

    Example:
        >>> numbers = estimate_condition_numbers(torch.eye(4))
        >>> numbers.kappa, numbers.kappa_tilde
        (1.0, 4.0)
    """
    if isinstance(features, Tensor):
        rows = (feature_map or _first_tensor)(features)
    else:
        rows = _gather(features, feature_map or _first_tensor, num_samples)
    X = rows.detach().flatten(start_dim=1)
    n = len(X)
    expect(n > 0, "features", "at least one sample", Words("none"), "Pass a non-empty data set.")
    expect(
        bool(X.isfinite().all()),
        "features",
        "finite",
        Words("NaN or Inf"),
        "Clean or scale the data first.",
    )
    if rtol is None:
        rtol = max(X.shape) * torch.finfo(X.dtype if X.is_floating_point() else torch.double).eps
    U, S, _ = torch.linalg.svd(X.double(), full_matrices=False)
    rank = int((rtol * S[0] < S).sum())
    expect(rank > 0, "features", "not all zero", Words("only zeros"), "Check the data set.")
    U, eigenvalues = U[:, :rank], S[:rank] ** 2 / n
    L, mu = float(eigenvalues[0]), float(eigenvalues[-1])
    return ConditionNumbers(
        L=L,
        # Both bounds hold exactly; rounding must not break them for those who check.
        L1=max(L, _largest_eigenvalue(U, X.double().square().sum(dim=1))),
        mu=mu,
        kappa_tilde=max(1.0, _largest_eigenvalue(U, n * U.square().sum(dim=1))),
    )


def _largest_eigenvalue(U: Tensor, weights: Tensor) -> float:
    return float(torch.linalg.eigvalsh(U.mT @ (weights[:, None] * U))[-1])


def _gather(
    batches: Iterable[Any], feature_map: Callable[[Any], Tensor], num_samples: int
) -> Tensor:
    collected: list[Tensor] = []
    missing = num_samples
    for batch in batches:
        rows = feature_map(batch)[:missing]
        collected.append(rows)
        missing -= len(rows)
        if missing <= 0:
            break
    return torch.cat(collected) if collected else torch.empty(0, 1)


def _first_tensor(batch: Any) -> Tensor:
    if isinstance(batch, Mapping):
        batch = next(iter(batch.values()))
    elif isinstance(batch, Sequence):
        batch = batch[0]
    if not isinstance(batch, Tensor):
        raise TypeError(
            f"Expected a batch to be or to begin with a tensor, got {type(batch).__name__}. "
            "Pass `feature_map`, a function from a batch to its features."
        )
    return batch
