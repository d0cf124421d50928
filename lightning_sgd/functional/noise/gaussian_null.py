r"""Share of directions that a test of normality rejects, calibrated by Gaussian noise of the same covariance.

Tests on several directions use the same vectors and depend on each other, the more so the fewer directions carry the
noise. The rejected share then varies far more than that of independent tests: in two effective dimensions sometimes
half of the directions are rejected at a level of 5 %, although the noise is Gaussian. So the share is compared with its
distribution under Gaussian noise of the measured covariance. With P the projections of m vectors and Z an m × m matrix
of independent normal numbers, :math:`P Z^\top` is such noise in the same directions, as if the orthonormal eigenvectors
of the Gram matrix were replaced by Gaussian ones and its spectrum kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from lightning_sgd.functional.noise.normality_tests import (
    NormalityTest,
    anderson_darling,
    jarque_bera,
    shapiro_wilk,
)

TestName: TypeAlias = Literal["shapiro_wilk", "anderson_darling", "jarque_bera"]
TESTS: Mapping[str, Callable[[Tensor], NormalityTest]] = MappingProxyType(
    {
        "shapiro_wilk": shapiro_wilk,
        "anderson_darling": anderson_darling,
        "jarque_bera": jarque_bera,
    }
)
BATCH = 2**17  # small enough for the cache


@dataclass(frozen=True)
class DirectionTests:
    """Tests of normality on several directions, beside what they give for Gaussian noise of the same covariance.

    Attributes:
        rejected: Share of directions that are rejected at the level of one test.
        expected: Mean share for Gaussian noise.
        limit: Share above which ``p_value`` is at most the rate of false alarms.
        p_value: Calibrated p-value: how often Gaussian noise has this share or a larger one.
        statistic: Mean of the test statistic over directions.
        expected_statistic: The same for Gaussian noise, which depends on the number of vectors.
        num_directions: How many directions were tested.
        num_constant: How many more were left out, because all projections are equal, as for dead units.
    """

    rejected: float = math.nan
    expected: float = math.nan
    limit: float = math.nan
    p_value: float = math.nan
    statistic: float = math.nan
    expected_statistic: float = math.nan
    num_directions: int = 0
    num_constant: int = 0


def direction_tests(
    projections: Tensor,
    generator: torch.Generator,
    test: TestName = "shapiro_wilk",
    level: float = 0.05,
    false_alarm_rate: float = 0.01,
    num_bootstraps: int = 199,
) -> DirectionTests:
    r"""Test each direction, and calibrate the share that is rejected.

    The calibrated p-value of the share F is :math:`(1 + \#\{b: F_b^* \ge F\})/(B + 1)` over B parametric bootstraps.

    Cost: B + 1 sorts of all projections, and 2 m² R B operations.

    Args:
        projections: Projections of m vectors on R directions, shape (R, m).
        generator: For the Gaussian noise, on the CPU.
        test: Name of the test.
        level: Level of the test on one direction.
        false_alarm_rate: How often Gaussian noise may exceed ``limit``.
        num_bootstraps: Number of samples of Gaussian noise [B]; a p-value below 1/(B + 1) cannot be found.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> heavy = torch.randn(100, 64, generator=generator) * torch.logspace(-1, 1, 64)
        >>> found = direction_tests(heavy, generator, num_bootstraps=99)
        >>> found.rejected > 0.9, found.limit < 0.2, found.p_value
        (True, True, 0.01)
    """
    # Exactly equal, as of a dead unit: tests are not defined there, and their NaN would count as accepted.
    varies = (projections != projections[:, :1]).any(dim=1)
    usable, num_constant = _scaled(projections[varies]), int((~varies).sum())
    if not len(usable) or not bool(usable.isfinite().all()):
        return DirectionTests(num_constant=num_constant)
    share, statistic = _shares(usable[None], test, level)
    null = [
        _shares(noise, test, level) for noise in _gaussian_like(usable, generator, num_bootstraps)
    ]
    shares, statistics = (torch.cat(values) for values in zip(*null, strict=True))
    # Equal shares count as larger: p-values are never too small.
    exceeded = int((shares >= share).sum())
    return DirectionTests(
        float(share),
        float(shares.mean()),
        _limit(shares, false_alarm_rate),
        (1 + exceeded) / (num_bootstraps + 1),
        float(statistic),
        float(statistics.mean()),
        len(usable),
        num_constant,
    )


def _scaled(projections: Tensor) -> Tensor:
    """Centre and scale to at most 1 before the cast to float32, which can hold neither large means nor all scales."""
    centered = projections - projections.mean(dim=1, keepdim=True)
    return (centered / centered.abs().amax(dim=1, keepdim=True)).float()


def _limit(shares: Tensor, rate: float) -> float:
    """Return the share above which the calibrated p-value is at most ``rate``; infinite if there is none."""
    # The factor: 0.01 · 200 must not be rounded to 1.99…
    rank = math.floor(rate * (len(shares) + 1) * (1 + 1e-9))
    return float(shares.sort(descending=True).values[rank - 1]) if rank else math.inf


def _shares(projections: Tensor, test: TestName, level: float) -> tuple[Tensor, Tensor]:
    """Return the rejected share and the mean statistic of each of b sets, shape (b, R, m)."""
    statistic, p_value = TESTS[test](projections)
    return (p_value < level).double().mean(dim=-1), statistic.mean(dim=-1)


def _gaussian_like(
    projections: Tensor, generator: torch.Generator, num_sets: int
) -> Iterator[Tensor]:
    """Yield sets of projections (b, R, m) of Gaussian vectors with the covariance of these, which are centred."""
    num = projections.shape[1]
    batch = max(1, BATCH // projections.numel())
    for begin in range(0, num_sets, batch):
        size = min(batch, num_sets - begin)
        normal = torch.randn(size, num, num, generator=generator)
        yield projections @ normal.to(projections.device)
