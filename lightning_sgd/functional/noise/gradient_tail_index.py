"""Tail indices of gradient noise: of each coordinate over batches, and of all coordinates pooled.

The paper pools all coordinates, as if they were independent and of one law. In a network they are neither: unequal
scales alone make Gaussian noise look heavy-tailed. The index by coordinate needs no such assumption.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_sgd.functional.noise.gradient_sample import GradientSample
from lightning_sgd.functional.noise.tail_index import (
    TailIndexResult,
    dyadic_tail_index,
    largest_divisor,
    log_moment_tail_index,
)

MIN_SAMPLES = 16
NOTHING = TailIndexResult(math.nan, math.nan)


@dataclass(frozen=True)
class GradientTailIndex:
    """Tail indices of one sample of gradients.

    Attributes:
        coordinate: Index by coordinate over batches, from differences of pairs; 1/α is averaged over coordinates.
        pooled: Index of all entries of the noise as one sequence, batch after batch, by the paper's estimator.
        pooled_profile: Dyadic index and profile of the same sequence.
        pooled_shuffled: The paper's estimator for the same entries in random order. It equals ``pooled`` up to noise if
            they are independent and of one law, as the estimator supposes.
        layers: Index by coordinate of each parameter.
    """

    coordinate: TailIndexResult
    pooled: TailIndexResult
    pooled_profile: TailIndexResult
    pooled_shuffled: float
    layers: dict[str, float] = field(default_factory=dict)


def gradient_tail_index(
    sample: GradientSample, generator: torch.Generator, layers: bool = False
) -> GradientTailIndex:
    """Measure the tails of the noise in a sample.

    Args:
        sample: Gradients at one point.
        generator: Source of the random order, on the CPU.
        layers: Whether to measure each parameter as well.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> rows = torch.randn(64, 4000, generator=generator) * torch.logspace(-3, 3, 4000)
        >>> found = gradient_tail_index(GradientSample(rows, 1, {}, 0), generator)
        >>> round(found.coordinate.alpha, 1), found.pooled_shuffled < 1.3  # scales that differ look heavy
        (2.0, True)
    """
    noise, differences = sample.noise.flatten(), sample.differences
    # A permutation keeps the values and destroys their order: where the index changes with it, the entries are not
    # alike.
    order = torch.randperm(noise.numel(), generator=generator).to(noise.device)
    parts = sample.layers.items() if layers else ()
    return GradientTailIndex(
        _by_coordinate(differences),
        _paper(noise),
        dyadic_tail_index(noise) if noise.numel() >= MIN_SAMPLES else NOTHING,
        _paper(noise[order]).alpha,
        {name: _by_coordinate(differences[:, part]).alpha for name, part in parts},
    )


def _by_coordinate(differences: Tensor) -> TailIndexResult:
    return dyadic_tail_index(differences, dim=0) if len(differences) >= 2 else NOTHING


def _paper(entries: Tensor) -> TailIndexResult:
    num = entries.numel()
    if num < MIN_SAMPLES:
        return NOTHING
    length = largest_divisor(num)
    # A prime number has no such divisor: take ⌊√K⌋ and leave the last entries out.
    return log_moment_tail_index(entries, length if length > 1 else math.isqrt(num))
