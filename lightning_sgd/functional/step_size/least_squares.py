r"""How large a batch, and how large a step, mini-batch SGD on least squares can use.

For samples (x, y), H = E[xxᵀ] and the residual ε of the best w, with Σ = E[ε²xxᵀ],

- R² is the smallest number with E[‖x‖²xxᵀ] ⪯ R²·H,
- ρ = d·λmax(S)/Tr(S) with HS + SH = Σ says how far the noise is from ε independent of x, where it is 1.

The largest step for which the rates of the paper hold, of twice the step of its theorems, is

    γ_max(b) = 2b / (R²ρ + (b − 1)·‖H‖),

which grows like b until R²ρ and (b − 1)·‖H‖ are the same, at b = 1 + ρR²/‖H‖, and stays near 2/‖H‖ after that.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_sgd._validation import Words, expect


@dataclass(frozen=True, slots=True)
class LeastSquaresConstants:
    """What batch size and step size of SGD on a least-squares problem depend on.

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
    r"""The batch size up to which the step may grow nearly as fast as the batch: :math:`1 + \rho R^2/\|H\|`.

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
    r"""The largest step of mini-batch SGD at the optimal rate: :math:`2b / (R^2\rho + (b - 1)\|H\|)`.

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


@torch.no_grad()
def least_squares_constants(
    features: Tensor, residuals: Tensor, rtol: float = 1e-6
) -> LeastSquaresConstants:
    r"""The constants of the empirical distribution of some samples.

    For a network take the features of its last hidden layer and the residuals of a linear output. One thin singular
    value decomposition :math:`X/\sqrt N = U W^{1/2} V^\top` gives everything: :math:`R^2 = \lambda_{\max}(U^\top
    \mathrm{diag}(\|x_i\|^2) U)`, which is at most :math:`\max_i \|x_i\|^2` and just that where samples are linearly
    independent.

    ρ is too large for few samples: 1.4 instead of 1 for 2000 Gaussian samples in 50 dimensions. Look at the batch size
    with ``well_specified``, too.

    Cost: O(N·d·min(N, d)) time and O(N·d) memory in float64.

    Args:
        features: Of each sample, shape (N, …), flattened to (N, d) [x].
        residuals: Target less prediction of each sample, shape (N,) or (N, 1) [ε].
        rtol: Eigenvalues of H below this share of the largest are taken for zero.

    Raises:
        ValueError: If shapes do not fit or features vanish.
    """
    x = features.detach().flatten(1).double()
    r = residuals.detach().flatten().double()
    remedy = "Give one residual, target less prediction, for each row of features."
    expect(len(x) == len(r) > 0, "residuals", f"{len(x)} numbers", tuple(residuals.shape), remedy)
    finite = bool(x.isfinite().all() and r.isfinite().all())
    expect(
        finite,
        "features and residuals",
        "finite",
        Words("NaN or Inf"),
        "Leave out what overflowed.",
    )
    u, s, _ = torch.linalg.svd(x / math.sqrt(len(x)), full_matrices=False)
    kept = _kept(s.square(), rtol)
    u, s = u[:, kept], s[kept]
    fourth = u.T @ (x.square().sum(dim=1, keepdim=True) * u)
    noise = s[:, None] * (u.T @ (r.square()[:, None] * u)) * s
    return _constants(s.square(), fourth, noise)


@torch.no_grad()
def constants_of_moments(
    second: Tensor, fourth: Tensor, noise: Tensor, rtol: float = 1e-6
) -> LeastSquaresConstants:
    """The same where the moments of the distribution are known.

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
    kept = _kept(w, rtol)
    w, v = w[kept], v[:, kept]
    whitened = v / w.sqrt()
    return _constants(w, whitened.T @ fourth.double() @ whitened, v.T @ noise.double() @ v)


def _kept(eigenvalues: Tensor, rtol: float) -> Tensor:
    largest = float(eigenvalues.max()) if len(eigenvalues) else 0.0
    expect(largest > 0, "features", "not all zero", largest, "There is nothing to learn from them.")
    return eigenvalues > rtol * largest


def _constants(w: Tensor, fourth: Tensor, noise: Tensor) -> LeastSquaresConstants:
    """From the eigenvalues of H, the fourth moment whitened by H, and Σ in the basis of the eigenvectors."""
    solution = noise / (w[:, None] + w)  # HS + SH = Σ
    trace = float(solution.trace())
    largest = float(torch.linalg.eigvalsh(solution)[-1])
    return LeastSquaresConstants(
        R2=float(torch.linalg.eigvalsh(fourth)[-1]),
        norm_h=float(w.max()),
        mu=float(w.min()),
        rho_m=len(w) * largest / trace if trace > 0 else 1.0,  # without noise it does not matter
        sigma2_mle=2 * trace,
        rank=len(w),
    )
