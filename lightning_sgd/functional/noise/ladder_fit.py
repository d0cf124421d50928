"""Least squares on the levels of a dyadic ladder, errors from the spread over blocks, and what the profile says."""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from lightning_sgd.functional.noise.dyadic_ladder import LadderSums

Verdict: TypeAlias = Literal["stable", "finite variance", "undecided"]

SIGMAS = 3.0
"""Standard errors from which on a difference counts."""
FLAT_P = 0.001
"""A profile is not flat if one as uneven has a smaller probability."""
SHARP = 0.1
"""Largest error of 1/α with which the upper levels can speak for a finite variance; 1/1.67 is as far from ½."""


class LadderFit:
    """Mean logarithms by level with their covariance, and linear combinations of them.

    Args:
        sums: From one pass over the samples.
    """

    def __init__(self, sums: LadderSums) -> None:
        self.sums = LadderSums(*(tensor.cpu() for tensor in vars(sums).values()))
        self.means = self.sums.log_sums / self.sums.counts
        self.covariance = self._covariance()

    def _covariance(self) -> Tensor:
        """Of ratios of sums over blocks, to first order; NaN for fewer than two blocks."""
        sums, num = self.sums, float(self.sums.num_blocks)
        if num < 2:
            return torch.full((len(self.means),) * 2, math.nan, dtype=torch.float64)
        # Block by block: the sum of logarithms less what their number lets expect.
        residual = torch.cat([torch.eye(len(self.means)), -torch.diag(self.means)], dim=1)
        spread = residual @ sums.products @ residual.mT
        return spread * (num / (num - 1)) / torch.outer(sums.counts, sums.counts)

    def combine(self, weights: Tensor) -> tuple[float, float]:
        """A combination of the means, and its standard error.

        Args:
            weights: One for each level.
        """
        variance = float(weights @ self.covariance @ weights)
        error = math.nan if math.isnan(variance) else math.sqrt(max(variance, 0.0))
        return float(weights @ self.means), error

    def slope_weights(self, first: int = 0) -> Tensor:
        """The combination that is 1/α, by least squares with the numbers of sums as weights.

        Args:
            first: Lowest level that takes part.
        """
        counts = self.sums.counts.clone()
        counts[:first] = 0
        level = torch.arange(len(counts), dtype=torch.float64) * math.log(2)
        centred = level - (counts @ level) / counts.sum()
        return counts * centred / (counts @ centred.square())

    def local_weights(self) -> Tensor:
        """The combinations that are 1/α between neighbouring levels, one in each row."""
        return torch.diff(torch.eye(len(self.means), dtype=torch.float64), dim=0) / math.log(2)

    def judge(self) -> Verdict:
        """Stable needs a flat profile and an index below 2; a finite variance shows on the upper half of the levels."""
        slope, error = self.combine(self.slope_weights())
        if not (math.isfinite(slope) and math.isfinite(error)):
            return "undecided"
        if slope - SIGMAS * error > 0.5 and self._is_flat():
            return "stable"
        high, spread = self.combine(self.slope_weights(self.sums.levels // 2))
        reaches_two = abs(high - 0.5) <= SIGMAS * spread <= SHARP
        return "finite variance" if reaches_two else "undecided"

    def _is_flat(self) -> bool:
        """Whether all local slopes may be equal, by Hotelling's test; false where there is nothing to compare."""
        local = torch.diff(self.local_weights(), dim=0)
        rank, num_blocks = len(local), int(self.sums.num_blocks)
        if rank == 0 or num_blocks <= rank + 1:
            return False
        gaps, spread = local @ self.means, local @ self.covariance @ local.mT
        squared = float(gaps @ torch.linalg.pinv(spread, hermitian=True) @ gaps)
        den = num_blocks - rank
        return _f_survival(squared * den / (rank * (num_blocks - 1)), rank, den) >= FLAT_P


def _f_survival(value: float, num: int, den: int) -> float:
    from scipy.special import fdtrc

    return float(fdtrc(num, den, value))
