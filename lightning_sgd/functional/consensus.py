"""How far apart the models of the ranks are."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from lightning_sgd.functional.flat_buffers import FlatBuffers, real


@torch.no_grad()
def squared_distance(flat: FlatBuffers) -> float:
    """Squared Euclidean distance of the tensors from what is in their buffers, in float64.

    Args:
        flat: Its buffers hold the mean of the ranks' models, say.

    Example:
        >>> flat = FlatBuffers([torch.tensor([3.0, 4.0])])
        >>> squared_distance(flat)  # nothing is packed: the distance from zero
        25.0
    """
    pairs = zip(flat.views, map(real, flat.tensors), strict=True)
    return sum(float((tensor.double() - view.double()).square().sum()) for view, tensor in pairs)


def consensus_distance(squared: Sequence[float]) -> float:
    r"""Root mean square distance of n models from their mean, :math:`\sqrt{\frac1n \sum_i \|x_i - \bar x\|^2}`.

    Args:
        squared: By rank, the squared distance of its model from the mean.

    Example:
        >>> consensus_distance([9.0, 9.0])
        3.0
    """
    return math.sqrt(sum(squared) / len(squared))
