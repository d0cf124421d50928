r"""Tail index of samples from the growth of their sums: the estimator of the paper, and its dyadic ladder.

If samples are independent and symmetric α-stable, sums of K₁ of them are :math:`K_1^{1/\alpha}` times as large. The
paper compares single samples with sums of :math:`K_1 \approx \sqrt K`. The variance is smallest near :math:`K_1 = e^2`,
and a single block length cannot tell stable samples from others: the ladder takes all lengths 1, 2, 4, … at once. The
local indices between neighbouring lengths, which are equal for stable laws only, show what the one number is worth.
Standard errors come from the spread over blocks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from lightning_sgd._validation import expect, expect_one_of
from lightning_sgd.functional.noise.dyadic_ladder import (
    LadderSums,
    coordinate_sums,
    pooled_sums,
    stream_sums,
)

Verdict: TypeAlias = Literal["stable", "finite variance", "undecided"]
MAX_LEVELS = 12
MIN_BLOCKS = 16
MIN_ROW_BLOCKS = 8
SIGMAS = 3.0
"""A difference counts from so many standard errors on."""
FLAT_P = 0.001
"""Significance level of the test whether the profile is flat."""
SHARP = 0.1
"""Largest error of 1/α at which the upper levels may indicate a finite variance: 1/1.67 differs from ½ by as much."""


@dataclass(frozen=True)
class TailIndexResult:
    """A tail index with what is needed to judge it.

    Attributes:
        alpha: The index [α]; 2 for Gaussian samples, 1 for Cauchy. Above 2 where samples are centred or bounded: the
            number is not clamped. NaN if samples are missing, not finite or all zero.
        standard_error: Standard error of ``alpha``, from the spread over blocks; NaN for fewer than two blocks.
        profile: Local index between neighbouring levels: flat for a stable law, rising to 2 for a finite variance.
        profile_errors: Standard errors of the profile.
        verdict: ``"stable"`` if the index is below 2 and the profile flat, ``"finite variance"`` if sums of many
            samples grow as Gaussian ones, else ``"undecided"``.
        zero_fraction: Share of samples that are exactly zero; they have no logarithm and are left out.
        num_samples: Number of samples.
    """

    alpha: float
    standard_error: float
    profile: tuple[float, ...] = ()
    profile_errors: tuple[float, ...] = ()
    verdict: Verdict = "undecided"
    zero_fraction: float = 0.0
    num_samples: int = 0


def log_moment_tail_index(
    samples: Tensor, block_length: int | Literal["sqrt"] = "sqrt", center: bool = False
) -> TailIndexResult:
    r"""Estimate the index as in the paper: mean log magnitude of sums of K₁ samples against that of single samples.

    .. math::
        \frac1{\hat\alpha} = \frac1{\ln K_1}\Big(\frac1{K_2}\sum_{j=1}^{K_2} \ln|Y_j|
        - \frac1K\sum_{i=1}^K \ln|x_i|\Big), \qquad Y_j = \sum_{i=1}^{K_1} x_{(j-1)K_1+i}

    Zeros are left out, not replaced by a small number, so that the index does not depend on the scale.

    Args:
        samples: The samples, in order, read as one sequence of length K.
        block_length: Length of the sums [K₁]; samples that fill no block are left out. ``"sqrt"`` is the paper's, the
            largest divisor of K up to √K; 8 has the smallest variance.
        center: Whether to subtract the mean first, as the paper does by the full gradient.

    Raises:
        ValueError: If there is no block of at least 2.

    Example:
        >>> round(log_moment_tail_index(torch.tensor([1.0, 2.0, 3.0, 4.0])).alpha, 6)
        0.952455

    Reference:
        Umut Şimşekli, Levent Sagun, Mert Gürbüzbalaban. A Tail-Index Analysis of Stochastic Gradient Noise in Deep
        Neural Networks. ICML, 2019. https://arxiv.org/abs/1901.06053
    """
    flat = samples.detach().flatten().double()
    length = _block_length(flat.numel(), block_length)
    # Subtracting the mean of the same samples makes sums too small, hence α too large.
    blocks = (flat - flat.mean() if center else flat)[: flat.numel() // length * length]
    blocks = blocks.view(-1, length)
    # The authors' code adds 2.2e-16 inside of the logarithms instead, which makes the index depend on the scale.
    logs, nonzero = _logs(blocks)
    sums, filled = _logs(blocks.sum(1))
    # Each mean over the values that are not zero, which may be different numbers of them.
    growth = sums.sum() / filled.sum() - logs.sum() / nonzero.sum()
    usable = filled & nonzero.any(1)
    # The spread over blocks and not the formula for independent stable samples, which gradients are not.
    each = sums[usable] - (logs.sum(1) / nonzero.sum(1))[usable]
    spread = float(each.std() / math.sqrt(len(each))) if len(each) > 1 else math.nan
    alpha, error = _inverse(float(growth) / math.log(length), spread / math.log(length))
    zeros = 1.0 - float(nonzero.double().mean())
    return TailIndexResult(alpha, error, zero_fraction=zeros, num_samples=blocks.numel())


def dyadic_tail_index(
    samples: Tensor | Iterable[Tensor], levels: int | None = None, dim: Literal[0] | None = None
) -> TailIndexResult:
    r"""Estimate the index by the growth of sums of 1, 2, 4, … samples, with standard error, profile and verdict.

    With :math:`m_j` the mean log magnitude of sums of :math:`2^j` samples, 1/α is the slope of :math:`m_j` over
    :math:`j\ln 2`, by least squares with the numbers of sums as weights; the profile is
    :math:`\alpha_j = \ln 2/(m_{j+1} - m_j)`. Standard errors come from the spread over blocks of :math:`2^J` samples,
    which allows for dependence within a block, not between blocks.

    Cost: one pass, about 4 ns per sample on one CPU core, O(1) memory besides the samples; a stream of chunks of any
    sizes gives the same as one tensor.

    Args:
        samples: Samples, in order; or an iterable of such tensors, for sequences that do not fit into memory.
        levels: Number of doublings [J]; by default 12, less where that would leave fewer than 16 blocks, or 8 with
            ``dim=0``. A stream has 12.
        dim: ``None`` takes all samples for one sequence, which is right only if they are independent and of one scale.
            0 takes each column for a sequence, and the mean of 1/α over the columns; their scales do not matter then.

    Raises:
        ValueError: If there are not enough samples for one doubling.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> result = dyadic_tail_index(torch.randn(2**18, generator=generator))
        >>> abs(result.alpha - 2) < 3 * result.standard_error, result.verdict
        (True, 'finite variance')
    """
    expect_one_of(dim, Literal[0] | None, "dim")
    if not isinstance(samples, Tensor):
        return tail_index_of(stream_sums(samples, MAX_LEVELS if levels is None else levels))
    length = samples.numel() if dim is None else len(samples)
    min_blocks = MIN_BLOCKS if dim is None else MIN_ROW_BLOCKS
    levels = default_levels(length, min_blocks) if levels is None else levels
    expect(
        1 <= levels <= 40 and length >> levels >= 1,
        "levels",
        f"at least 1, and 2^levels at most the {length} samples",
        levels,
        "Give more samples, or fewer levels.",
    )
    sums = pooled_sums if dim is None else coordinate_sums
    return tail_index_of(sums(samples, levels)[0])


def default_levels(num_samples: int, min_blocks: int = MIN_BLOCKS) -> int:
    """Choose the largest number of doublings that leaves ``min_blocks`` blocks, at least one and at most 12.

    Args:
        num_samples: Length of the sequence.
        min_blocks: Smallest number of blocks.

    Example:
        >>> default_levels(64), default_levels(10**6)
        (2, 12)
    """
    return max(1, min(MAX_LEVELS, int(math.log2(max(num_samples // min_blocks, 2)))))


def tail_index_of(sums: LadderSums) -> TailIndexResult:
    """Compute the index from the sums of a ladder.

    Args:
        sums: Result of one pass over the samples.
    """
    fit = LadderFit(sums)
    profile = [_inverse(*fit.combine(row)) for row in fit.local_weights()]
    return TailIndexResult(
        *_inverse(*fit.combine(fit.slope_weights())),
        tuple(value for value, _ in profile),
        tuple(spread for _, spread in profile),
        fit.judge(),
        float(sums.num_zeros / sums.num_samples),
        int(sums.num_samples),
    )


def _inverse(slope: float, error: float) -> tuple[float, float]:
    """Return 1/slope and its standard error, to first order."""
    alpha = 1 / slope if slope else math.inf
    return alpha, alpha**2 * error


def _logs(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return ln|value|, with 0 in the places of zeros, and a mask of the other places."""
    nonzero = values != 0
    return torch.where(nonzero, values, 1.0).abs().log(), nonzero


def largest_divisor(num: int) -> int:
    """Find the largest divisor up to the square root, the length of the paper's sums.

    Args:
        num: Number of samples.

    Example:
        >>> largest_divisor(1200), largest_divisor(1201)
        (30, 1)
    """
    return next((k for k in range(math.isqrt(num), 1, -1) if num % k == 0), 1)


def _block_length(num: int, wanted: int | Literal["sqrt"]) -> int:
    if isinstance(wanted, str):
        expect_one_of(wanted, Literal["sqrt"], "block_length", "Or give a number.")
    length = largest_divisor(num) if wanted == "sqrt" else wanted
    remedy = "Leave some samples out if their number has no such divisor, or give a block length."
    expect(2 <= length <= num, "block_length", f"between 2 and the {num} samples", length, remedy)
    return length


class LadderFit:
    """Mean logarithms by level with their covariance, and linear combinations of them.

    Args:
        sums: Result of one pass over the samples.
    """

    def __init__(self, sums: LadderSums) -> None:
        self.sums = LadderSums(*(tensor.cpu() for tensor in vars(sums).values()))
        self.means = self.sums.log_sums / self.sums.counts
        self.covariance = self._covariance()

    def _covariance(self) -> Tensor:
        """Compute the covariance of the means, as ratios of sums over blocks, to first order; NaN for one block."""
        sums, num = self.sums, float(self.sums.num_blocks)
        if num < 2:
            return torch.full((len(self.means),) * 2, math.nan, dtype=torch.float64)
        # Zeros are left out, so a mean is a ratio of random sums. To first order its error is the sum over blocks of
        # (sum of logarithms − mean · number of logarithms), divided by the total number.
        residual = torch.cat([torch.eye(len(self.means)), -torch.diag(self.means)], dim=1)
        spread = residual @ sums.products @ residual.mT
        return spread * (num / (num - 1)) / torch.outer(sums.counts, sums.counts)

    def combine(self, weights: Tensor) -> tuple[float, float]:
        """Return the combination of the means with one weight per level, and its standard error."""
        variance = float(weights @ self.covariance @ weights)
        error = math.nan if math.isnan(variance) else math.sqrt(max(variance, 0.0))
        return float(weights @ self.means), error

    def slope_weights(self, first: int = 0) -> Tensor:
        """Return the combination that is 1/α, by least squares over the levels from ``first`` on.

        The weights are the numbers of sums: the variance of a level is about proportional to one over its number.
        """
        counts = self.sums.counts.clone()
        counts[:first] = 0
        level = torch.arange(len(counts), dtype=torch.float64) * math.log(2)
        centred = level - (counts @ level) / counts.sum()
        return counts * centred / (counts @ centred.square())

    def local_weights(self) -> Tensor:
        """Return the combinations that are 1/α between neighbouring levels, one in each row."""
        return torch.diff(torch.eye(len(self.means), dtype=torch.float64), dim=0) / math.log(2)

    def judge(self) -> Verdict:
        """Decide by a flat profile with an index below 2, or by an index of 2 on the upper half of the levels."""
        slope, error = self.combine(self.slope_weights())
        if not (math.isfinite(slope) and math.isfinite(error)):
            return "undecided"
        # The slope is 1/α: above ½ the index is below 2.
        if slope - SIGMAS * error > 0.5 and self._is_flat():
            return "stable"
        high, spread = self.combine(self.slope_weights(self.sums.levels // 2))
        reaches_two = abs(high - 0.5) <= SIGMAS * spread <= SHARP
        return "finite variance" if reaches_two else "undecided"

    def _is_flat(self) -> bool:
        """Test by Hotelling's T² whether all local slopes may be equal; false if there are too few blocks or levels."""
        local = torch.diff(self.local_weights(), dim=0)
        rank, num_blocks = len(local), int(self.sums.num_blocks)
        if rank == 0 or num_blocks <= rank + 1:
            return False
        gaps, spread = local @ self.means, local @ self.covariance @ local.mT
        # A pseudo-inverse, because the covariance is singular for samples that are all alike.
        squared = float(gaps @ torch.linalg.pinv(spread, hermitian=True) @ gaps)
        den = num_blocks - rank
        return _f_survival(squared * den / (rank * (num_blocks - 1)), rank, den) >= FLAT_P


def _f_survival(value: float, num: int, den: int) -> float:
    from scipy.special import fdtrc

    return float(fdtrc(num, den, value))
