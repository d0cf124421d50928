"""How far apart the models of the ranks are."""

from __future__ import annotations

import math
from collections.abc import Sequence


def consensus_distance(squared: Sequence[float]) -> float:
    r"""Root mean square distance of n models from their mean, :math:`\sqrt{\frac1n \sum_i \|x_i - \bar x\|^2}`.

    Args:
        squared: By rank, the squared distance of its model from the mean.

    Example:
        >>> consensus_distance([9.0, 9.0])
        3.0
    """
    return math.sqrt(sum(squared) / len(squared))
