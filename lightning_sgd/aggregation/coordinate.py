"""Rules that treat every coordinate by itself."""

from __future__ import annotations

from torch import Tensor

from lightning_sgd.aggregation._aggregator import CoordinateRule
from lightning_sgd.functional.robust.order_statistics import (
    column_median,
    mean_near_median,
    mean_near_trimmed_mean,
    trimmed_mean,
)


class CoordinateMedian(CoordinateRule):
    r"""The median of every coordinate; of an even number of rows the mean of the two in the middle.

    Half of the rows may be arbitrary, but its error grows like :math:`\sqrt d`, and where workers' data differ it
    is far from their mean; :class:`~lightning_sgd.NNM` before it repairs much of that.

    Cost: a sorting network, :math:`O(n \log^2 n)` elementwise minima and maxima per coordinate.

    Args:
        num_byzantine: How many of the workers may be faulty [f].

    Example:
        >>> import torch
        >>> CoordinateMedian(1)(torch.tensor([[1.0, 5.0], [2.0, 4.0], [90.0, -90.0]]))
        tensor([2., 4.])
    """

    def reduce(self, block: Tensor, num_byzantine: int) -> Tensor:
        """Return the median of each column."""
        return column_median(block)


class TrimmedMean(CoordinateRule):
    """The mean of every coordinate without its ``num_byzantine`` smallest and as many largest values.

    It needs 2f < n, and is off by no more than κ = 6r(1 + r), r = f/(n − 2f), times the variance of the honest rows.

    Cost: as the median, less where f is small.

    Args:
        num_byzantine: How many of the workers may be faulty [f]; so many values are cut at either end.

    Example:
        >>> import torch
        >>> TrimmedMean(1)(torch.tensor([[1.0], [2.0], [4.0], [90.0]]))
        tensor([3.])
    """

    def reduce(self, block: Tensor, num_byzantine: int) -> Tensor:
        """Return the trimmed mean of each column."""
        return trimmed_mean(block, num_byzantine)


class MeaMed(CoordinateRule):
    """The mean, in every coordinate, of the n − f values nearest to the median.

    Cost: a sorting network, as the median.

    Args:
        num_byzantine: How many of the workers may be faulty [f]; so many values are left out.

    Example:
        >>> import torch
        >>> MeaMed(1)(torch.tensor([[1.0], [2.0], [3.0], [90.0]]))
        tensor([2.])

    Reference:
        Cong Xie, Oluwasanmi Koyejo, Indranil Gupta. Generalized Byzantine-tolerant SGD. arXiv 1802.10116, 2018.
    """

    def reduce(self, block: Tensor, num_byzantine: int) -> Tensor:
        """Return the mean of the values nearest to the median of each column."""
        return mean_near_median(block, num_byzantine)


class Phocas(CoordinateRule):
    """The mean, in every coordinate, of the n − f values nearest to the trimmed mean.

    Cost: a sorting network, as the median.

    Args:
        num_byzantine: How many of the workers may be faulty [f]; so many values are left out.

    Example:
        >>> import torch
        >>> Phocas(1)(torch.tensor([[1.0], [2.0], [3.0], [90.0]]))
        tensor([2.])

    Reference:
        Cong Xie, Oluwasanmi Koyejo, Indranil Gupta. Phocas: dimensional Byzantine-resilient stochastic gradient
        descent. arXiv 1805.09682, 2018.
    """

    def reduce(self, block: Tensor, num_byzantine: int) -> Tensor:
        """Return the mean of the values nearest to the trimmed mean of each column."""
        return mean_near_trimmed_mean(block, num_byzantine)
