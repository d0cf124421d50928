"""What was drawn, and with which probability at that moment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_sgd.functional.sampling.priority_sampling import (
    WeightNorm,
    importance_weights,
    normalized_weights,
)


@dataclass(frozen=True, slots=True)
class Draw:
    """The batch of all ranks together, as it was drawn.

    Attributes:
        indices: Numbers of the samples, int64; rank r trains on the r-th of equal parts.
        probabilities: Of each, when it was drawn, float64.
        smallest_probability: A lower bound for all samples at that moment.
        step: How many updates of the priorities there had been.
        num_padded: How many samples at the end only make the parts equal; they get weight 0.
        is_uniform: True if all samples had the same probability, so that nothing is to be corrected.
    """

    indices: Tensor
    probabilities: Tensor
    smallest_probability: float
    step: int
    num_padded: int = 0
    is_uniform: bool = False

    def weights(self, num_samples: int, beta: float, norm: WeightNorm = "none") -> Tensor | None:
        """Return the weights of the losses of all samples, float32; ``None`` where all are exactly 1.

        Args:
            num_samples: Size of the data set.
            beta: 1 for an unbiased gradient, 0 for no correction.
            norm: What to divide by.
        """
        if self.num_padded:
            num = len(self.indices)
            weights = torch.full((num,), num / (num - self.num_padded))
            weights[num - self.num_padded :] = 0.0
            return weights
        if self.is_uniform or beta == 0.0:
            return None
        weights = importance_weights(self.probabilities, num_samples, beta)
        if norm == "none":
            return weights.float()
        largest = (num_samples * self.smallest_probability) ** -beta if norm == "max" else 1.0
        return normalized_weights(weights, norm, largest).float()

    def part(self, values: Tensor, rank: int, num_ranks: int) -> Tensor:
        """Select the part of a rank.

        Args:
            values: One for each sample of the draw.
            rank: Number of the rank.
            num_ranks: Number of ranks.
        """
        size = len(self.indices) // num_ranks
        return values[rank * size : (rank + 1) * size]

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and numbers."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}
