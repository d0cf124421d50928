"""Test whether the noise in gradients is Gaussian: on random directions, and by coordinate."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from lightning_sgd._validation import expect, expect_one_of
from lightning_sgd.functional.noise.gaussian_null import (
    TESTS,
    DirectionTests,
    TestName,
    direction_tests,
)
from lightning_sgd.functional.noise.gram_projections import (
    effective_dimension,
    gram_projections,
    noise_gram,
    norm_excess_kurtosis,
)
from lightning_sgd.functional.noise.normality_tests import MAX_SAMPLES

GaussianityVerdict: TypeAlias = Literal[
    "Gaussian", "Gaussian on random directions only", "not Gaussian", "undecided"
]
NUM_FAMILIES = 2  # random directions, coordinates
MIN_GRADIENTS = 20


@dataclass(frozen=True)
class GaussianitySettings:
    """Settings of the tests, shared by functions, metric and monitor.

    Attributes:
        num_directions: Number of random directions, and of coordinates [R].
        test: Name of the test on one direction.
        level: Level of the test on one direction.
        false_alarm_rate: Largest probability that Gaussian noise is called something else.
        num_bootstraps: Number of samples of Gaussian noise for the calibration [B].
    """

    num_directions: int = 256
    test: TestName = "shapiro_wilk"
    level: float = 0.05
    false_alarm_rate: float = 0.01
    num_bootstraps: int = 199

    def __post_init__(self) -> None:
        remedy = "Several hundred make the share precise."
        expect(
            self.num_directions >= 1, "num_directions", "at least 1", self.num_directions, remedy
        )
        expect_one_of(self.test, TestName, "test")
        for name in ("level", "false_alarm_rate"):
            value = getattr(self, name)
            expect(0 < value < 1, name, "between 0 and 1", value, "Usual are 0.05 and 0.01.")
        # The smallest p-value that B bootstraps can give is 1/(B + 1).
        least = math.ceil(NUM_FAMILIES / self.false_alarm_rate - 1e-9) - 1
        remedy = (
            "So small a rate of false alarms cannot be told with fewer; raise one or the other."
        )
        num = self.num_bootstraps
        expect(num >= least, "num_bootstraps", f"at least {least}", num, remedy)

    @property
    def family_rate(self) -> float:
        """The rate of false alarms for each family of directions; by Bonferroni both together have the stated one."""
        return self.false_alarm_rate / NUM_FAMILIES


@dataclass(frozen=True)
class GaussianityResult:
    """Results for one sample of gradients.

    Attributes:
        random: Tests on random directions; they detect whether lengths of the noise vary more than those of Gaussian
            noise.
        coordinate: Tests on single coordinates; they detect the law of each coordinate.
        verdict: ``"Gaussian"`` if neither family rejects more directions than Gaussian noise does, at the rate of false
            alarms for both together. This is no proof that the noise is Gaussian.
        norm_kurtosis: Excess kurtosis of projections on random directions.
        effective_dimension: Number of directions over which the noise spreads, at most the number of gradients.
        rejected_anderson_darling: Share of the random directions that the test of Anderson and Darling rejects.
        random_quantiles: Mean order statistics of the projections on random directions, in standard deviations.
        coordinate_quantiles: The same by coordinate.
        layers: Share of random directions rejected, by parameter; not calibrated.
    """

    random: DirectionTests
    coordinate: DirectionTests
    verdict: GaussianityVerdict = "undecided"
    norm_kurtosis: float = math.nan
    effective_dimension: float = math.nan
    rejected_anderson_darling: float = math.nan
    random_quantiles: tuple[float, ...] = ()
    coordinate_quantiles: tuple[float, ...] = ()
    layers: dict[str, float] = field(default_factory=dict)

    @property
    def values(self) -> dict[str, float]:
        """The numbers by name, without layers and quantiles."""
        return {
            **_named(self.random, ""),
            **_named(self.coordinate, "coordinate_"),
            "statistic": self.random.statistic,
            "expected_statistic": self.random.expected_statistic,
            "rejected_anderson_darling": self.rejected_anderson_darling,
            "norm_kurtosis": self.norm_kurtosis,
            "effective_dimension": self.effective_dimension,
        }


def gradient_gaussianity(
    rows: Tensor,
    generator: torch.Generator | None = None,
    settings: GaussianitySettings | None = None,
    layers: Mapping[str, slice] | None = None,
) -> GaussianityResult:
    """Test whether the noise in gradients at one point is Gaussian.

    A vector is Gaussian if all of its projections are, but random projections are sums over all coordinates, nearly
    Gaussian by themselves. So single coordinates are tested beside them, and both shares of rejections are compared
    with those of Gaussian noise of the same covariance.

    Cost: the Gram matrix, m² d operations; its eigenvectors; and B + 1 sorts of 2 R rows of m numbers.

    Args:
        rows: One gradient in each row, shape (m, d), m from 20 to 5000; the mean is subtracted here.
        generator: For directions, coordinates and the calibration, on the CPU; by default one with seed 0.
        settings: Settings of the tests.
        layers: Columns of the parameters that are also tested separately.

    Raises:
        ValueError: If there are too many gradients for the tests.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> normal = torch.randn(64, 2000, generator=generator) * torch.logspace(-2, 2, 2000)
        >>> gradient_gaussianity(normal).verdict
        'Gaussian'
        >>> light = torch.empty(64, 2000).exponential_(generator=generator)
        >>> gradient_gaussianity(light).verdict  # sums of independent coordinates hide their law
        'Gaussian on random directions only'
        >>> gradient_gaussianity(normal * torch.logspace(-1, 1, 64)[:, None]).verdict
        'not Gaussian'
    """
    settings = settings or GaussianitySettings()
    generator = generator or torch.Generator().manual_seed(0)
    remedy = "The p-values of the tests are not valid for more; test a part of them."
    expect(len(rows) <= MAX_SAMPLES, "rows", f"at most {MAX_SAMPLES}", len(rows), remedy)
    if len(rows) < MIN_GRADIENTS:
        return GaussianityResult(DirectionTests(), DirectionTests())
    gram = noise_gram(rows)
    drawn = gram_projections(gram, settings.num_directions, generator)
    # Without replacement: a coordinate that is tested twice is no further evidence.
    columns = torch.randperm(rows.shape[1], generator=generator)[: settings.num_directions]
    single = rows[:, columns.to(rows.device)].T
    random, coordinate = (_tests(part, generator, settings) for part in (drawn, single))
    return GaussianityResult(
        random,
        coordinate,
        _verdict(random, coordinate, settings),
        float(norm_excess_kurtosis(gram)),
        float(effective_dimension(gram)),
        _share(drawn, "anderson_darling", settings.level),
        _quantiles(drawn),
        _quantiles(single),
        _by_layer(rows, layers or {}, generator, settings),
    )


def _named(tests: DirectionTests, prefix: str) -> dict[str, float]:
    names = ("rejected", "expected", "limit", "p_value")
    return {f"{prefix}{name}": getattr(tests, name) for name in names}


def _tests(
    projections: Tensor, generator: torch.Generator, settings: GaussianitySettings
) -> DirectionTests:
    return direction_tests(
        projections,
        generator,
        settings.test,
        settings.level,
        settings.family_rate,
        settings.num_bootstraps,
    )


def _verdict(
    random: DirectionTests, coordinate: DirectionTests, settings: GaussianitySettings
) -> GaussianityVerdict:
    if math.isnan(random.p_value):
        return "undecided"
    # Random directions first: if noise is not Gaussian there, the coordinates do not matter.
    if random.p_value <= settings.family_rate:
        return "not Gaussian"
    if coordinate.p_value <= settings.family_rate:
        return "Gaussian on random directions only"
    return "Gaussian"


def _by_layer(
    rows: Tensor,
    layers: Mapping[str, slice],
    generator: torch.Generator,
    settings: GaussianitySettings,
) -> dict[str, float]:
    shares = {}
    for name, columns in layers.items():
        gram = noise_gram(rows[:, columns])
        drawn = gram_projections(gram, settings.num_directions, generator)
        shares[name] = _share(drawn, settings.test, settings.level)
    return shares


def _share(projections: Tensor, test: TestName, level: float) -> float:
    """Return the share of rejected directions, NaN if there is no noise."""
    p_value = TESTS[test](projections).p_value
    # Constant directions have no p-value.
    usable = p_value[p_value.isfinite()]
    return float((usable < level).double().mean())


def _quantiles(projections: Tensor) -> tuple[float, ...]:
    """Return the mean over directions of the sorted, standardised projections."""
    ordered = projections.cpu().double().sort(dim=1).values
    spread = ordered.std(dim=1, keepdim=True)
    usable = (spread > 0).squeeze(1)
    scaled = (ordered - ordered.mean(dim=1, keepdim=True))[usable] / spread[usable]
    return tuple(scaled.mean(dim=0).tolist())
