r"""Constants of a least-squares problem, and what follows for batch size and step size of mini-batch SGD.

For samples (x, y), H = E[xxᵀ] and the residual ε of the best w, with Σ = E[ε²xxᵀ],

- R² is the smallest number with E[‖x‖²xxᵀ] ⪯ R²·H, the L₁ of the paper about MaSS,
- ρ = d·λmax(S)/Tr(S) with HS + SH = Σ says how far the noise is from ε independent of x, where it is 1.

The largest step for which the rates of the paper hold, of twice the step of its theorems, is

    γ_max(b) = 2b / (R²ρ + (b − 1)·‖H‖),

which grows like b until R²ρ and (b − 1)·‖H‖ are the same, at b = 1 + ρR²/‖H‖, and stays near 2/‖H‖ after that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_sgd._validation import Words, expect

_NOTHING = "There is nothing to learn from zeros: check the data set."


@dataclass(frozen=True, slots=True)
class ConditionNumbers:
    """Condition numbers that decide how fast SGD and MaSS converge on interpolated least squares.

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


@dataclass(frozen=True, slots=True)
class LeastSquaresConstants:
    """Constants that decide on batch size and step size of SGD on a least-squares problem.

    Attributes:
        R2: Smallest number with E[‖x‖²xxᵀ] ⪯ R²·H [R²].
        norm_h: Largest eigenvalue of H = E[xxᵀ] [‖H‖].
        mu: Smallest eigenvalue of H that is not taken for zero [μ].
        rho_m: Misspecification, at least 1; 1 if residuals do not depend on the features [ρ].
        sigma2_mle: Tr(H⁻¹Σ): n times twice the excess risk of the best estimator from n samples [σ̂²].
        rank: Number of eigenvalues that are not taken for zero [d].
    """

    R2: float
    norm_h: float
    mu: float
    rho_m: float
    sigma2_mle: float
    rank: int

    @property
    def kappa(self) -> float:
        """The condition number of H [κ]."""
        return self.norm_h / self.mu


def critical_batch_size(constants: LeastSquaresConstants, *, well_specified: bool = False) -> float:
    r"""Compute the batch size up to which the step may grow nearly as fast as the batch: :math:`1 + \rho R^2/\|H\|`.

    Below it, b times the batch takes nearly b times fewer steps; above it the step stands still, and a larger batch
    only averages noise that a tail average or a smaller step would remove as well.

    Args:
        constants: Of the problem.
        well_specified: Take ρ for 1, which estimates from few samples exceed by far.

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
        >>> constants = least_squares_constants(x, torch.tensor([1.0, -1.0, 1.0, -1.0]))
        >>> round(critical_batch_size(constants), 6), round(max_learning_rate(constants, batch_size=3), 6)
        (3.0, 3.0)
    """
    rho = 1.0 if well_specified else constants.rho_m
    return 1 + rho * constants.R2 / constants.norm_h


def max_learning_rate(
    constants: LeastSquaresConstants, batch_size: int, *, well_specified: bool = False
) -> float:
    r"""Compute the largest step of mini-batch SGD at the optimal rate: :math:`2b / (R^2\rho + (b - 1)\|H\|)`.

    The theorems take half of it. It is for the loss ½(y − ⟨w, x⟩)², averaged over the batch, without momentum.

    Args:
        constants: Of the problem.
        batch_size: Samples of all ranks and accumulated batches in one step [b].
        well_specified: Take ρ for 1.

    Raises:
        ValueError: If the batch is empty.
    """
    expect(batch_size >= 1, "batch_size", "at least 1", batch_size, "Count the samples of a step.")
    rho = 1.0 if well_specified else constants.rho_m
    return 2 * batch_size / (constants.R2 * rho + (batch_size - 1) * constants.norm_h)


def estimate_condition_numbers(
    features: Tensor | Iterable[Any],
    *,
    feature_map: Callable[[Any], Tensor] | None = None,
    num_samples: int = 4096,
    rtol: float | None = None,
) -> ConditionNumbers:
    r"""Compute the exact condition numbers of the empirical distribution of some features.

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
        rtol: Singular values below this fraction of the largest count as zero; by default those that the precision
            of the features' type does not resolve, max(n, d) times its machine epsilon in float32 and float64.

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
    x = rows.detach().flatten(start_dim=1)
    expect(
        len(x) > 0, "features", "at least one sample", Words("none"), "Use a non-empty data set."
    )
    finite = bool(x.isfinite().all())
    expect(finite, "features", "finite", Words("NaN or Inf"), "Clean or scale the data first.")
    found = _decompose(x, rtol)
    # ⟨x_i, H⁺x_i⟩ = n·‖u_i‖², so κ̃ needs no inverse of H.
    leverages = found.u.square().sum(dim=1)
    return ConditionNumbers(
        L=found.norm_h,
        L1=found.fourth_moment,
        mu=found.mu,
        # The bound holds exactly; rounding must not break it for those who check.
        kappa_tilde=max(1.0, _largest_eigenvalue(found.u, len(x) * leverages)),
    )


@torch.no_grad()
def least_squares_constants(
    features: Tensor, residuals: Tensor, rtol: float | None = None
) -> LeastSquaresConstants:
    r"""Compute the constants of the empirical distribution of some samples.

    For a network take the features of its last hidden layer and the residuals of a linear output. One thin singular
    value decomposition :math:`X/\sqrt N = U W^{1/2} V^\top` gives everything: :math:`R^2 = \lambda_{\max}(U^\top
    \mathrm{diag}(\|x_i\|^2) U)`, which is at most :math:`\max_i \|x_i\|^2` and just that where samples are linearly
    independent. ``R2``, ``norm_h`` and ``mu`` are ``L1``, ``L`` and ``mu`` of :func:`estimate_condition_numbers`.

    ρ is too large for few samples: 1.4 instead of 1 for 2000 Gaussian samples in 50 dimensions. Look at the batch size
    with ``well_specified``, too.

    Cost: O(N·d·min(N, d)) time and O(N·d) memory in float64.

    Args:
        features: Of each sample, shape (N, …), flattened to (N, d) [x].
        residuals: Target less prediction of each sample, shape (N,) or (N, 1) [ε].
        rtol: Eigenvalues of H below this share of the largest are taken for zero; by default those that the
            precision of the features does not resolve, as in :func:`estimate_condition_numbers`.

    Raises:
        ValueError: If shapes do not fit or features vanish.
    """
    x = features.detach().flatten(1)
    r = residuals.detach().flatten().double()
    remedy = "Give one residual, target less prediction, for each row of features."
    expect(len(x) == len(r) > 0, "residuals", f"{len(x)} numbers", tuple(residuals.shape), remedy)
    finite = bool(x.isfinite().all() and r.isfinite().all())
    remedy = "Leave out what overflowed."
    expect(finite, "features and residuals", "finite", Words("NaN or Inf"), remedy)
    # `rtol` is about eigenvalues of H, which are squares of singular values of X.
    found = _decompose(x, None if rtol is None else math.sqrt(rtol))
    # Σ in the basis of the eigenvectors; the factors s keep small directions to full precision.
    s = found.eigenvalues.sqrt()
    noise = s[:, None] * _second_moment(found.u, r.square()) * s
    return _constants(found.eigenvalues, found.fourth_moment, noise)


@torch.no_grad()
def constants_of_moments(
    second: Tensor, fourth: Tensor, noise: Tensor, rtol: float = 1e-6
) -> LeastSquaresConstants:
    """Compute the constants from known moments of the distribution.

    Args:
        second: H = E[xxᵀ], shape (d, d).
        fourth: E[‖x‖²xxᵀ], shape (d, d); Tr(H)·H + 2H² for Gaussian x.
        noise: Σ = E[ε²xxᵀ], shape (d, d); σ²H where residuals do not depend on the features.
        rtol: Eigenvalues of H below this share of the largest are taken for zero.

    Example:
        >>> H = torch.diag(1 / torch.arange(1.0, 51.0))
        >>> constants = constants_of_moments(H, H.trace() * H + 2 * H @ H, 0.01 * H)
        >>> round(constants.R2, 3), round(critical_batch_size(constants), 2)
        (6.499, 7.5)
    """
    w, v = torch.linalg.eigh(second.double())
    # Strictly, so that eigenvalues of zero go even for `rtol=0`.
    kept = rtol * w[-1] < w
    expect(bool(kept.any()), "second", "not zero", Words("only zeros"), _NOTHING)
    w, v = w[kept], v[:, kept]
    whitened = v / w.sqrt()
    r2 = float(torch.linalg.eigvalsh(whitened.T @ fourth.double() @ whitened)[-1])
    return _constants(w, r2, v.T @ noise.double() @ v)


class _Decomposition(NamedTuple):
    """Decomposition of H = XᵀX/n of rank r, from features X of shape (n, d).

    Attributes:
        u: Left singular vectors, shape (n, r).
        eigenvalues: Of H, the largest first, shape (r,).
        fourth_moment: Smallest number with E[‖x‖²xxᵀ] ⪯ R²·H [R², L₁].
    """

    u: Tensor
    eigenvalues: Tensor
    fourth_moment: float

    @property
    def norm_h(self) -> float:
        return float(self.eigenvalues[0])

    @property
    def mu(self) -> float:
        return float(self.eigenvalues[-1])


def _decompose(x: Tensor, rtol: float | None) -> _Decomposition:
    # Of X and not of H: singular values are known to ε of the largest, so eigenvalues of H down to ε²‖H‖. A
    # decomposition of H itself, or a cut-off made for one, would lose all below ε‖H‖.
    wide = x.double()
    u, s, _ = torch.linalg.svd(wide, full_matrices=False)
    kept = (_precision(x) if rtol is None else rtol) * s[0] < s
    expect(bool(kept.any()), "features", "not all zero", Words("only zeros"), _NOTHING)
    u, eigenvalues = u[:, kept], s[kept].square() / len(x)
    fourth_moment = _largest_eigenvalue(u, wide.square().sum(dim=1))
    # L ≤ L₁ holds exactly; rounding must not break it for those who check.
    return _Decomposition(u, eigenvalues, max(fourth_moment, float(eigenvalues[0])))


def _precision(x: Tensor) -> float:
    """Return the share of the largest singular value below which a singular value may be rounding alone."""
    stored = x.dtype if x.is_floating_point() else torch.double
    # NumPy's rule for the arithmetic behind the features, which is no less precise than float32. Rounding the result
    # to a narrower type moves singular values by at most ε‖X‖_F/2 ≤ ε·√min(n, d)·σ₁.
    arithmetic = max(x.shape) * torch.finfo(torch.promote_types(stored, torch.float32)).eps
    return max(arithmetic, math.sqrt(min(x.shape)) * torch.finfo(stored).eps)


def _second_moment(u: Tensor, weights: Tensor) -> Tensor:
    return u.mT @ (weights[:, None] * u)


def _constants(w: Tensor, r2: float, noise: Tensor) -> LeastSquaresConstants:
    """Build the result from the eigenvalues of H, R², and Σ in the basis of the eigenvectors."""
    # In the basis of the eigenvectors of H the Lyapunov equation falls apart into single numbers.
    solution = noise / (w[:, None] + w)  # HS + SH = Σ
    trace = float(solution.trace())
    largest = float(torch.linalg.eigvalsh(solution)[-1])
    return LeastSquaresConstants(
        R2=r2,
        norm_h=float(w.max()),
        mu=float(w.min()),
        rho_m=len(w) * largest / trace if trace > 0 else 1.0,  # without noise it does not matter
        # HS + SH = Σ times H⁻¹ has the trace 2·Tr(S) = Tr(H⁻¹Σ).
        sigma2_mle=2 * trace,
        rank=len(w),
    )


def _largest_eigenvalue(u: Tensor, weights: Tensor) -> float:
    return float(torch.linalg.eigvalsh(_second_moment(u, weights))[-1])


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
