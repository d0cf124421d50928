"""MaSS in theory: optimal hyper-parameters and the regimes of the batch size.

For least squares that some weights solve exactly. The symbols: H = E[xxᵀ] with largest eigenvalue L and
smallest non-zero eigenvalue μ; L₁ the smallest number with E[‖x‖²xxᵀ] ⪯ L₁H; κ̃ the smallest number with
E[⟨x, H⁺x⟩xxᵀ] ⪯ κ̃H; m the number of samples behind one step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

from lightning_sgd._validation import expect, is_finite_at_least
from lightning_sgd.functional.optim.mass import mass_coefficients

BatchSizeRegime: TypeAlias = Literal["linear", "diminishing", "saturation"]


@dataclass(frozen=True, slots=True)
class MaSSHyperParameters:
    """Optimal hyper-parameters of MaSS on an interpolating least-squares problem.

    Attributes:
        eta1: Step size [η1], the ``lr`` of :class:`~lightning_sgd.MaSS`.
        eta2: Secondary step size [η2].
        gamma: Acceleration [γ].
        alpha: Inverse time scale [α = 1/√(κ_m κ̃_m)].
        kappa_m: Condition number of the mini-batch problem [κ_m].
        kappa_tilde_m: Statistical condition number of the mini-batch problem [κ̃_m].
        rate: Bound on the factor by which the expected squared error shrinks per step [1 − α].
    """

    eta1: float
    eta2: float
    gamma: float
    alpha: float
    kappa_m: float
    kappa_tilde_m: float
    rate: float


def mass_hyperparameters(
    L: float,
    L1: float,
    mu: float,
    kappa_tilde: float,
    batch_size: int,
) -> MaSSHyperParameters:
    r"""Compute the optimal hyper-parameters for a spectrum and a batch size.

    With :math:`L_m = L_1/m + (m-1)L/m`, :math:`\kappa_m = L_m/\mu` and
    :math:`\tilde\kappa_m = \tilde\kappa/m + (m-1)/m`,

    .. math::
        \eta_1 = \frac{1}{L_m}, \quad \alpha = \frac{1}{\sqrt{\kappa_m\tilde\kappa_m}}, \quad
        \gamma = \frac{1-\alpha}{1+\alpha}, \quad \eta_2 = \eta_1\,\frac{1 - 1/\tilde\kappa_m}{1+\alpha} .

    The loss then falls like :math:`e^{-t/\sqrt{\kappa_m\tilde\kappa_m}}`, against :math:`e^{-t/\kappa_m}` for SGD.

    Args:
        L: Largest eigenvalue of the Hessian [L].
        L1: Smallest number with E[‖x‖²xxᵀ] ⪯ L1·H [L₁]; at most the largest ‖x‖².
        mu: Smallest non-zero eigenvalue of the Hessian [μ].
        kappa_tilde: Statistical condition number for single samples [κ̃].
        batch_size: Samples behind one step, over all ranks and accumulated batches [m].

    Returns:
        The hyper-parameters; pass ``eta1``, ``alpha`` and ``kappa_tilde_m`` to :class:`~lightning_sgd.MaSS`.

    Raises:
        ValueError: Unless 0 < mu ≤ L ≤ L1, 1 ≤ kappa_tilde and 1 ≤ batch_size.

    Example:
        >>> best = mass_hyperparameters(L=1.0, L1=6.0, mu=2**-9, kappa_tilde=6.0, batch_size=1)
        >>> round(best.eta2, 8), round(best.gamma, 8)
        (0.13787336, 0.98537632)
    """
    _check_spectrum(L, L1, kappa_tilde)
    # SGD never moves along directions with eigenvalue zero, so they do not slow it down either.
    expect(0 < mu <= L, "mu", f"in (0, L] = (0, {L:g}]", mu, "Leave zero eigenvalues out.")
    expect(batch_size >= 1, "batch_size", "at least 1", batch_size, "Count samples per step.")
    # For m = 1 these are L₁ and κ̃ themselves, without rounding.
    L_m = L1 / batch_size + (1 - 1 / batch_size) * L
    kappa_m = L_m / mu
    kappa_tilde_m = kappa_tilde / batch_size + (1 - 1 / batch_size)
    alpha = 1 / math.sqrt(kappa_m * kappa_tilde_m)
    # With m samples behind a step κ̃_m takes the place of κ̃ in the update; m → ∞ gives Nesterov's method.
    coefficients = mass_coefficients(alpha, kappa_tilde_m)
    return MaSSHyperParameters(
        eta1=1 / L_m,
        eta2=coefficients.ratio / L_m,
        gamma=coefficients.gamma,
        alpha=alpha,
        kappa_m=kappa_m,
        kappa_tilde_m=kappa_tilde_m,
        rate=1 - alpha,
    )


def critical_batch_sizes(L: float, L1: float, kappa_tilde: float) -> tuple[float, float]:
    """Return the batch sizes at which more samples per step begin to pay less, and stop to pay.

    Args:
        L: Largest eigenvalue of the Hessian [L].
        L1: Smallest number with E[‖x‖²xxᵀ] ⪯ L1·H [L₁].
        kappa_tilde: Statistical condition number [κ̃].

    Returns:
        The pair (m1, m2) = (min, max) of L1/L and kappa_tilde. SGD stops to gain at L1/L already.

    Raises:
        ValueError: Unless 0 < L ≤ L1 and 1 ≤ kappa_tilde.

    Example:
        >>> critical_batch_sizes(L=1.0, L1=5.4387, kappa_tilde=130.0)
        (5.4387, 130.0)
    """
    _check_spectrum(L, L1, kappa_tilde)
    # κ_m saturates at m = L₁/L and κ̃_m at m = κ̃. One saturated factor turns 1/m into 1/√m, two end the gain.
    return min(L1 / L, kappa_tilde), max(L1 / L, kappa_tilde)


def batch_size_regime(batch_size: int, L: float, L1: float, kappa_tilde: float) -> BatchSizeRegime:
    """Return whether a batch size lies in the regime of linear scaling, diminishing returns or saturation.

    Args:
        batch_size: Samples behind one step [m].
        L: Largest eigenvalue of the Hessian [L].
        L1: Smallest number with E[‖x‖²xxᵀ] ⪯ L1·H [L₁].
        kappa_tilde: Statistical condition number [κ̃].

    Returns:
        ``"linear"`` (steps fall like 1/m), ``"diminishing"`` (like 1/√m) or ``"saturation"`` (not at all).

    Raises:
        ValueError: Unless 0 < L ≤ L1, 1 ≤ kappa_tilde and 1 ≤ batch_size.

    Example:
        >>> [batch_size_regime(m, L=1.0, L1=5.44, kappa_tilde=130.0) for m in (4, 64, 512)]
        ['linear', 'diminishing', 'saturation']
    """
    expect(batch_size >= 1, "batch_size", "at least 1", batch_size, "Count samples per step.")
    first, second = critical_batch_sizes(L, L1, kappa_tilde)
    if batch_size < first:
        return "linear"
    return "diminishing" if batch_size < second else "saturation"


def _check_spectrum(L: float, L1: float, kappa_tilde: float) -> None:
    remedy = "See `estimate_condition_numbers` for consistent values."
    expect(math.isfinite(L) and L > 0, "L", "a positive number", L, remedy)
    # Estimates of L and L1 carry rounding, hence the slack.
    expect(is_finite_at_least(L1, L * (1 - 1e-9)), "L1", f"at least L = {L:g}", L1, remedy)
    expect(is_finite_at_least(kappa_tilde, 1), "kappa_tilde", "at least 1", kappa_tilde, remedy)
