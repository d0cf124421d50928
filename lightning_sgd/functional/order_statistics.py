"""Order statistics of the columns of a few rows."""

from __future__ import annotations

from torch import Tensor


def column_median(block: Tensor) -> Tensor:
    """Median of each column, the mean of the two in the middle where there are two.

    Args:
        block: Finite numbers of shape (n, s).

    Example:
        >>> import torch
        >>> column_median(torch.tensor([[1.0], [2.0], [5.0], [90.0]]))
        tensor([3.5000])
    """
    ordered = block.sort(dim=0).values
    n = len(block)
    return (ordered[(n - 1) // 2] + ordered[n // 2]) / 2


def trimmed_mean(block: Tensor, num_trimmed: int) -> Tensor:
    """Mean of each column without its smallest and largest values.

    Args:
        block: Finite numbers of shape (n, s).
        num_trimmed: How many values are cut at either end [f], fewer than n/2.

    Example:
        >>> import torch
        >>> trimmed_mean(torch.tensor([[1.0], [2.0], [4.0], [90.0]]), 1)
        tensor([3.])
    """
    ordered = block.sort(dim=0).values
    return ordered[num_trimmed : len(block) - num_trimmed].mean(dim=0)
