"""The noise scale of gradients, over points and ranks, as a torchmetrics ``Metric``."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from lightning_sgd.functional.noise.noise_scale import (
    GradientNoise,
    NoiseScale,
    gradient_noise,
    noise_scale,
)
from lightning_sgd.metrics._scalar_metric import ScalarMetric

NAMES = tuple(field.name for field in fields(GradientNoise))


class GradientNoiseScale(ScalarMetric):
    r"""The batch size at which noise and signal in gradients are equally large: :math:`\mathrm{Tr}(\Sigma)/\|G\|^2`.

    Every update takes several gradients at one point; noise and signal are summed over points and ranks before one is
    divided by the other. The state is six numbers.

    Args:
        **kwargs: Settings of every ``torchmetrics.Metric``.

    Example:
        >>> metric, generator = GradientNoiseScale(), torch.Generator().manual_seed(0)
        >>> for _ in range(10):  # ‖G‖² = 10 and Tr Σ = 32·1000
        ...     metric.update(0.1 + torch.randn(16, 1000, generator=generator), batch_size=32)
        >>> scale = metric.result()
        >>> scale.low < 3200 < scale.high
        True

    Reference:
        Sam McCandlish, Jared Kaplan, Dario Amodei, OpenAI Dota Team. An Empirical Model of Large-Batch Training.
        arXiv 1812.06162, 2018.
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False
    plot_lower_bound = 0.0

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in NAMES:
            # In float64, because sums over many points grow while the signal in them may cancel.
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, rows: Tensor, batch_size: int) -> None:
        """Add gradients at one point.

        Args:
            rows: One gradient in each row, shape (m, s).
            batch_size: Samples behind one row.
        """
        # Sums, not ratios: a mean of ratios would be biased, and infinite where one point has no signal.
        noise = gradient_noise(rows, batch_size)
        for name in NAMES:
            setattr(self, name, getattr(self, name) + getattr(noise, name))

    def result(self) -> NoiseScale:
        """Return value and interval for all updates since the last reset."""
        trace, square, *variances, num_pairs = (float(getattr(self, name)) for name in NAMES)
        var_trace, var_square, covariance = variances
        total = GradientNoise(trace, square, var_trace, var_square, covariance, round(num_pairs))
        return noise_scale(total)

    def compute(self) -> Tensor:
        """Compute the noise scale in samples; infinite if no gradient is found in the noise, NaN without an update."""
        return torch.tensor(self.result().value, device=self.device)
