r"""Measures of rank: functions of the singular values of a matrix.

Each takes singular values σ of shape (…, r), in any order and at any scale, padded with zeros or not, and returns a
floating-point tensor of shape (…). Zeros alone give 0, and NaN gives NaN. With the defaults, for every spectrum,

.. math::
    \text{stable rank} \le \text{participation ratio} \le \text{effective rank of the squares}
    \le \text{effective rank} \le \text{rank}.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor

from lightning_sgd._validation import expect

SpectralNorm: TypeAlias = Literal["fro", "spectral"]


def threshold_rank(
    singular_values: Tensor, tol: float | Tensor = 1e-3, norm: SpectralNorm = "fro"
) -> Tensor:
    r"""Count the singular values above ``tol`` times a norm of the matrix.

    With the Frobenius norm this is the rank of Galanti et al., :math:`\#\{i : \sigma_i / \|W\|_F > \tau\}`.

    Args:
        singular_values: Tensor of shape (…, r).
        tol: Threshold [τ], or one per matrix of shape (…).
        norm: ``"fro"`` for the Frobenius norm, ``"spectral"`` for the largest singular value.

    Example:
        >>> threshold_rank(torch.tensor([2.0, 1.0, 1.0]), tol=0.409)
        tensor(1.)
    """
    if norm not in ("fro", "spectral"):
        expect(False, "norm", "'fro' or 'spectral'", norm, "The paper uses 'fro'.")
    ratios = _relative(singular_values)
    unit = ratios.square().sum(dim=-1).sqrt() if norm == "fro" else ratios.amax(dim=-1)
    return _count(ratios > (tol * unit)[..., None], ratios)


def hard_rank(singular_values: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Compute the rank up to rounding, as ``torch.linalg.matrix_rank`` defines it.

    Args:
        singular_values: Tensor of shape (…, r).
        rows: Number of rows of the matrix.
        columns: Number of columns of the matrix.
        dtype: Type in which the matrix was stored.

    Example:
        >>> hard_rank(torch.tensor([1.0, 1e-3, 1e-9]), 3, 3, torch.float32)
        tensor(2.)
    """
    return threshold_rank(singular_values, rounding_tolerance(rows, columns, dtype), "spectral")


def rounding_tolerance(rows: int, columns: int, dtype: torch.dtype) -> float:
    """Return the fraction of σ₁ below which σ can come from rounding: max(m, n) times machine epsilon.

    Half-precision types count as float32, the type of their products: by their own epsilon no rank would remain.

    Example:
        >>> rounding_tolerance(64, 512, torch.float64)
        1.1368683772161603e-13
    """
    return max(rows, columns) * torch.finfo(torch.promote_types(dtype, torch.float32)).eps


def energy_rank(singular_values: Tensor, eta: float = 0.99) -> Tensor:
    r"""Count the largest singular values that hold a share of the squared Frobenius norm.

    .. math:: \min \Big\{ k : \sum_{i \le k} \sigma_i^2 \ge \eta \sum_i \sigma_i^2 \Big\}

    Args:
        singular_values: Tensor of shape (…, r).
        eta: The share [η], in (0, 1].

    Example:
        >>> energy_rank(torch.tensor([2.0, 1.0, 1.0]), eta=0.6)
        tensor(1.)
    """
    if not 0 < eta <= 1:
        expect(False, "eta", "in (0, 1]", eta, "Common choices are 0.9 and 0.99.")
    ratios = _relative(singular_values).sort(dim=-1, descending=True).values
    energy = ratios.square().cumsum(dim=-1)
    # The last partial sum and not a sum of its own: for eta = 1 both must agree to the last bit.
    total = energy[..., -1:]
    # Of how many leading values the energy is still too small; one more completes the share.
    incomplete = _count(energy < eta * total, energy)
    return torch.where(total.squeeze(-1) == 0, 0.0, incomplete + 1)


def stable_rank(singular_values: Tensor) -> Tensor:
    r"""Compute the squared Frobenius norm over the squared spectral norm, :math:`\sum\sigma^2 / \sigma_1^2`.

    Args:
        singular_values: Tensor of shape (…, r).

    Example:
        >>> stable_rank(torch.tensor([2.0, 1.0, 1.0]))
        tensor(1.5000)
    """
    return _relative(singular_values).square().sum(dim=-1)


def effective_rank(singular_values: Tensor, power: int = 1) -> Tensor:
    r"""Compute the exponential of the entropy of the normalised spectrum.

    .. math:: \exp\Big(-\sum_i p_i \log p_i\Big), \qquad p_i = \sigma_i^k \Big/ \sum_j \sigma_j^k

    Args:
        singular_values: Tensor of shape (…, r).
        power: Exponent [k]: 1 for the definition of Roy and Vetterli, 2 for the entropy of the spectral energy, which
            has the same name in other papers.

    Example:
        >>> effective_rank(torch.tensor([2.0, 1.0, 1.0]))
        tensor(2.8284)

    Reference:
        Olivier Roy, Martin Vetterli. The effective rank: A measure of effective dimensionality. EUSIPCO, 2007.
    """
    if power not in (1, 2):
        expect(False, "power", "1 or 2", power, "1 is the definition of Roy and Vetterli.")
    weights = _relative(singular_values) ** power
    total = weights.sum(dim=-1)
    # `xlogy` has 0·log 0 = 0; only a spectrum of zeros needs a denominator.
    p = weights / torch.where(total == 0, 1.0, total)[..., None]
    entropy = -torch.xlogy(p, p).sum(dim=-1)
    return torch.where(total == 0, 0.0, entropy.exp())


def participation_ratio(singular_values: Tensor) -> Tensor:
    r"""Compute the effective number of equal squares, :math:`(\sum\sigma^2)^2 / \sum\sigma^4`.

    Args:
        singular_values: Tensor of shape (…, r).

    Example:
        >>> participation_ratio(torch.tensor([2.0, 1.0, 1.0]))
        tensor(2.)
    """
    return _squared_sum_over_sum_of_squares(_relative(singular_values).square())


def nuclear_ratio(singular_values: Tensor) -> Tensor:
    r"""Compute the nuclear norm over the spectral norm, :math:`\sum\sigma / \sigma_1`.

    Args:
        singular_values: Tensor of shape (…, r).

    Example:
        >>> nuclear_ratio(torch.tensor([2.0, 1.0, 1.0]))
        tensor(2.)
    """
    return _relative(singular_values).sum(dim=-1)


def intrinsic_dimension(singular_values: Tensor) -> Tensor:
    r"""Compute the squared nuclear norm over the squared Frobenius norm, :math:`(\sum\sigma)^2 / \sum\sigma^2`.

    Args:
        singular_values: Tensor of shape (…, r).

    Example:
        >>> intrinsic_dimension(torch.tensor([2.0, 1.0, 1.0]))
        tensor(2.6667)
    """
    return _squared_sum_over_sum_of_squares(_relative(singular_values))


def frobenius_norm(singular_values: Tensor) -> Tensor:
    r"""Compute the Frobenius norm, :math:`\sqrt{\sum\sigma^2}`, without overflow.

    Args:
        singular_values: Tensor of shape (…, r).

    Example:
        >>> frobenius_norm(torch.tensor([4e30, 3e30]))
        tensor(5.0000e+30)
    """
    return singular_values.amax(dim=-1) * stable_rank(singular_values).sqrt()


def spectral_norm(singular_values: Tensor) -> Tensor:
    """Return the largest singular value.

    Args:
        singular_values: Tensor of shape (…, r).
    """
    return singular_values.amax(dim=-1)


def rankme(singular_values: Tensor, eps: float = 1e-7) -> Tensor:
    r"""Compute RankMe of a feature matrix: the effective rank with a constant added to every share.

    .. math:: \exp\Big(-\sum_i p_i \log p_i\Big), \qquad p_i = \sigma_i \Big/ \sum_j \sigma_j + \epsilon

    The shares are not normalised again, so that the value can be slightly above the number of singular values. Unlike
    the other measures it counts zeros, each as one share of :math:`\epsilon`: pass min(N, K) values for N × K features.

    Args:
        singular_values: Tensor of shape (…, r).
        eps: The constant [ε].

    Example:
        >>> rankme(torch.tensor([2.0, 1.0, 1.0]))
        tensor(2.8284)

    Reference:
        Quentin Garrido et al. RankMe: Assessing the downstream performance of pretrained self-supervised
        representations by their rank. ICML, 2023. https://arxiv.org/abs/2210.02885
    """
    ratios = _relative(singular_values)
    total = ratios.sum(dim=-1)
    # ε is added after the division and p is not normalized again, as RankMe is published.
    p = ratios / torch.where(total == 0, 1.0, total)[..., None] + eps
    return torch.where(total == 0, 0.0, (-torch.xlogy(p, p).sum(dim=-1)).exp())


def _relative(singular_values: Tensor) -> Tensor:
    """Divide by the largest, so that squares and fourth powers neither overflow nor vanish."""
    largest = singular_values.amax(dim=-1, keepdim=True)
    return singular_values / torch.where(largest == 0, 1.0, largest)


def _count(mask: Tensor, ratios: Tensor) -> Tensor:
    count = mask.sum(dim=-1).to(ratios.dtype)
    # NaN compares as false, so it would be counted as a rank of 0.
    return torch.where(ratios.isnan().any(dim=-1), torch.nan, count)


def _squared_sum_over_sum_of_squares(ratios: Tensor) -> Tensor:
    squares = ratios.square().sum(dim=-1)
    return ratios.sum(dim=-1).square() / torch.where(squares == 0, 1.0, squares)
