r"""Rank collapse: how far the spectra of weight matrices have shrunk.

Mini-batch SGD with weight decay moves weight matrices towards low rank. Galanti et al. measure this by the number of
singular values above a threshold, relative to the Frobenius norm, averaged over the layers,

.. math::
    \mathrm{rank}_\tau(W) = \#\Big\{ i : \frac{\sigma_i(W)}{\|W\|_F} > \tau \Big\}.

The number means nothing without its threshold τ, so several are taken by default. Low rank is no measure of quality:
the authors find only a marginal effect on test performance.

Reference:
    Tomer Galanti, Zachary S. Siegel, Aparna Gupte, Tomaso Poggio. SGD and weight decay secretly minimize the rank of
    your neural network. CPAL, 2025. https://arxiv.org/abs/2206.05794
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_sgd.functional.spectra.spectral_stats import Measure, SpectralMeasures, StatsMethod


def spectral_stats(
    weight: Tensor,
    *,
    measures: Sequence[Measure] = ("rank", "stable_rank", "effective_rank"),
    tol: Sequence[float] = (1e-3, 1e-2, 5e-2),
    tol_norm: Literal["fro", "spectral"] = "fro",
    eta: Sequence[float] = (0.9, 0.99),
    method: StatsMethod = "auto",
    power: Literal[1, 2] = 1,
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Measures of the spectrum of one matrix, or of each matrix of a batch.

    ======================= ============================ ==============================================================
    measure                 key                          definition, from singular values σ₁ ≥ σ₂ ≥ …
    ======================= ============================ ==============================================================
    ``rank``                ``rank@0.001``, …            how many σ/‖W‖_F, or σ/σ₁ by ``tol_norm``, are above ``tol``
    ``hard_rank``           same as the measure          how many σ/σ₁ are above max(m, n) times machine epsilon
    ``energy_rank``         ``energy_rank@0.9``, …       how many σ hold the share ``eta`` of Σσ²
    ``stable_rank``         same as the measure          Σσ² / σ₁²
    ``effective_rank``      same as the measure          exp(−Σ p log p), p = σ/Σσ; with ``power=2`` p = σ²/Σσ²
    ``participation_ratio`` same as the measure          (Σσ²)² / Σσ⁴
    ``nuclear_ratio``       same as the measure          Σσ / σ₁
    ``intrinsic_dimension`` same as the measure          (Σσ)² / Σσ²
    ``frobenius_norm``      same as the measure          √Σσ²
    ``spectral_norm``       same as the measure          σ₁
    ======================= ============================ ==============================================================

    All but the norms ignore the scale of the matrix. A zero matrix has 0 everywhere, one with NaN or Inf has NaN.

    Cost: for short side m, about m²n + 4/3·m³ operations; with method ``"cheap"`` m²n, or mn·120 where the
    participation ratio is not asked for, and with ``"sketch"`` mn·64.

    Args:
        weight: Tensor of shape (…, m, n).
        measures: Which measures to take.
        tol: Thresholds of ``rank`` [τ].
        tol_norm: Norm that the thresholds refer to: ``"fro"`` as in the paper, or ``"spectral"``.
        eta: Shares of ``energy_rank`` [η].
        method: How to get the singular values, see
            ``lightning_sgd.functional.spectra.singular_values.singular_values``. By default the
            cheapest way that is accurate enough for the measures. ``"cheap"`` takes no decomposition, for the
            stable rank, the participation ratio and the norms; the spectral norm is then a lower bound.
        power: Exponent of ``effective_rank``.
        dtype: Type to compute in; by default float32 where it is accurate enough and else float64.

    Returns:
        For each key a tensor of shape (…).

    Raises:
        ValueError: If an argument is out of range, or the method in this type cannot tell so small a threshold from
            rounding.

    Example:
        >>> stats = spectral_stats(torch.diag(torch.tensor([2.0, 1.0, 1.0])), tol=(0.1, 0.5))
        >>> {key: round(value.item(), 4) for key, value in stats.items()}
        {'rank@0.1': 3.0, 'rank@0.5': 1.0, 'stable_rank': 1.5, 'effective_rank': 2.8284}

    Reference:
        Galanti et al., https://arxiv.org/abs/2206.05794; the rank at τ = 0.001 is theirs.
    """
    return SpectralMeasures(
        measures=measures,
        tol=tol,
        tol_norm=tol_norm,
        eta=eta,
        method=method,
        power=power,
        dtype=dtype,
    ).of_batch(weight)


def spectral_stats_of(matrices: Iterable[Tensor], **settings: Any) -> dict[str, Tensor]:
    """Measures of the spectra of matrices of any sizes, decomposed together.

    The matrices are taken one at a time, so that a generator need not hold them all. Results are on the device of the
    first matrix; nothing but the decompositions themselves waits for it.

    Args:
        matrices: Tensors of shape (m, n), each with its own m and n.
        **settings: As for :func:`spectral_stats`.

    Returns:
        For each key of :func:`spectral_stats` a tensor with one value per matrix.

    Raises:
        ValueError: As for :func:`spectral_stats`.

    Example:
        >>> spectral_stats_of([torch.eye(3), torch.eye(5, 9)], measures=["stable_rank"])
        {'stable_rank': tensor([3., 5.])}
    """
    return SpectralMeasures(**settings).of(matrices)
