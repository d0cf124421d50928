"""A test of Gaussian gradient noise over batches and ranks, as a torchmetrics ``Metric``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_sgd._validation import expect
from lightning_sgd.functional.noise.gaussian_null import TestName
from lightning_sgd.functional.noise.gradient_gaussianity import (
    GaussianityResult,
    GaussianitySettings,
    gradient_gaussianity,
)
from lightning_sgd.functional.noise.gradient_sample import Coordinates
from lightning_sgd.functional.noise.normality_tests import MAX_SAMPLES
from lightning_sgd.metrics._scalar_metric import ScalarMetric


class GradientGaussianity(ScalarMetric):
    """Share of random directions in which gradients since the last reset are not Gaussian.

    For Gaussian noise the share is about ``level``, with a spread that depends on the effective dimension:
    :meth:`result` gives the largest share to expect, the calibrated p-value, the tests by coordinate and the verdict of
    :func:`~lightning_sgd.gradient_gaussianity`. Gradients must be taken at the same weights. All of them are stored, in
    ``num_coordinates`` coordinates; those of all ranks are tested together.

    Args:
        num_directions: Number of random directions, and of coordinates [R].
        test: Test on one direction: ``"shapiro_wilk"``, ``"anderson_darling"`` or ``"jarque_bera"``.
        level: Level of the test on one direction.
        false_alarm_rate: Largest probability of a wrong verdict on Gaussian noise.
        num_bootstraps: Number of samples of Gaussian noise for the calibration [B].
        num_coordinates: Approximate number of coordinates to keep, spread evenly; ``None`` for all.
        seed: Seed of coordinates, directions and calibration.
        **kwargs: Settings of every ``torchmetrics.Metric``.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> metric, generator = GradientGaussianity(), torch.Generator().manual_seed(0)
        >>> for _ in range(100):
        ...     metric.update(torch.randn(3000, generator=generator))
        >>> round(metric.compute().item(), 1), metric.result().verdict
        (0.1, 'Gaussian')

    Reference:
        Panigrahi et al., https://arxiv.org/abs/1910.09626
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    rows: Tensor | list[Tensor]  # one tensor once ranks are combined

    def __init__(
        self,
        num_directions: int = 256,
        test: TestName = "shapiro_wilk",
        level: float = 0.05,
        false_alarm_rate: float = 0.01,
        num_bootstraps: int = 199,
        num_coordinates: int | None = 131072,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        remedy = "None keeps all."
        enough = num_coordinates is None or num_coordinates >= 1
        expect(enough, "num_coordinates", "at least 1", num_coordinates, remedy)
        self.settings = GaussianitySettings(
            num_directions, test, level, false_alarm_rate, num_bootstraps
        )
        self.num_coordinates, self.seed = num_coordinates, seed
        self.add_state("rows", [], dist_reduce_fx="cat")

    def update(self, gradients: Tensor) -> None:
        """Add gradients.

        Args:
            gradients: One of shape (coordinates,), or one in each row.
        """
        rows = gradients.detach()
        rows = rows[None] if rows.ndim == 1 else rows
        remedy = "Flatten each gradient, and give it a row."
        expect(rows.ndim == 2, "gradients", "of shape (m, d)", tuple(gradients.shape), remedy)
        num = len(rows) + sum(map(len, self.rows))
        remedy = "The p-values of the tests are not valid for more; reset before."
        expect(num <= MAX_SAMPLES, "gradients", f"at most {MAX_SAMPLES} in all", num, remedy)
        assert isinstance(self.rows, list)
        self.rows.append(self._kept(rows))

    def result(self) -> GaussianityResult:
        """Test the gradients that this rank has seen, with calibration and verdict."""
        rows = self.rows if isinstance(self.rows, Tensor) else torch.cat(self.rows or [_NOTHING])
        # A new generator for each result: asked twice, the metric answers the same.
        generator = torch.Generator().manual_seed(self.seed)
        return gradient_gaussianity(rows, generator, self.settings)

    def compute(self) -> Tensor:
        """Compute the share; NaN for fewer than 20 gradients, or if all are equal."""
        return torch.tensor(self.result().random.rejected, device=self.device)

    def _kept(self, rows: Tensor) -> Tensor:
        """Copy the coordinates of each row that are stored."""
        if self.num_coordinates is None:
            return rows.clone()
        # The same seed gives the same coordinates in every update and on every rank.
        coordinates = Coordinates({"": rows.shape[1]}, self.num_coordinates, self.seed)
        return torch.stack([coordinates.of([row]) for row in rows])


_NOTHING = torch.empty(0, 0)
