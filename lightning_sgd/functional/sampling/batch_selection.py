"""Choose the samples of a batch that are worth a backward pass: from rows to rows."""

from __future__ import annotations

import torch
from torch import Tensor


def percentiles(losses: Tensor, history: Tensor) -> Tensor:
    """Compute the share of the history that is strictly below each loss.

    Args:
        losses: Of shape (n,).
        history: Losses of the recent past, of shape (h,).

    Example:
        >>> percentiles(torch.tensor([0.5, 3.0]), torch.tensor([0.0, 1.0, 2.0, 3.0]))
        tensor([0.2500, 0.7500])
    """
    below = torch.searchsorted(history.sort().values, losses)
    return below / len(history)


def keep_by_percentile(
    losses: Tensor, history: Tensor, exponent: float, floor: float, numbers: Tensor
) -> Tensor:
    """Keep each row with probability max(floor, percentile^exponent), as Selective-Backprop; keep at least one.

    Args:
        losses: Of shape (n,).
        history: Losses of the recent past, this batch included.
        exponent: The larger, the fewer are kept: 1 / (1 + exponent) of them if losses are stationary [β].
        floor: Smallest probability [p_min].
        numbers: Uniform in [0, 1), of shape (n,).

    Returns:
        Numbers of the rows that are kept, in order.
    """
    probabilities = percentiles(losses, history).pow(exponent).clamp(min=floor)
    rows = (numbers < probabilities).nonzero().flatten()
    return rows if len(rows) else losses.argmax().reshape(1)


def keep_by_quantile(losses: Tensor, keep: float, numbers: Tensor) -> Tensor:
    """Draw ⌊keep · n⌋ rows without replacement, with weights q^(1/keep − 1) of the loss's quantile q, as Composer.

    Drawn by exponential clocks, the first of which has the law of a draw in proportion to weights, and so on.

    Args:
        losses: Of shape (n,).
        keep: Share that is kept.
        numbers: Uniform in [0, 1), of shape (n,).

    Returns:
        Numbers of the rows that are kept, at least one, in order.
    """
    quantiles = torch.empty_like(losses)
    steps = torch.arange(len(losses), dtype=losses.dtype, device=losses.device)
    quantiles[losses.argsort(stable=True)] = (steps + 0.5) / len(losses)
    clocks = -torch.log1p(-numbers) / quantiles.to(numbers.dtype).pow(1 / keep - 1)
    return clocks.topk(num_kept(len(losses), keep), largest=False).indices.sort().values


def keep_largest(scores: Tensor, keep: float) -> Tensor:
    """Keep the ⌊keep · n⌋ rows with the largest scores, at least one, in order."""
    return scores.topk(num_kept(len(scores), keep)).indices.sort().values


def draw_rows(scores: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Draw rows with replacement in proportion to their scores, and the weights that make a mean of them unbiased.

    Args:
        scores: Of shape (n,), ≥ 0 [s]; all alike where all are 0.
        numbers: Uniform in [0, 1), one for each row to draw.

    Returns:
        Numbers of the rows, and 1 / (n γ) of each with γ = s / Σs.
    """
    total = scores.double().sum()
    gamma = (
        scores.double() / total if total > 0 else torch.full_like(scores, 1 / len(scores)).double()
    )
    running = gamma.cumsum(0)
    last = int(gamma.nonzero().max())
    rows = torch.searchsorted(running, numbers.double() * running[-1], right=True).clamp(max=last)
    return rows, 1 / (len(scores) * gamma[rows])


def num_kept(num_rows: int, keep: float) -> int:
    """⌊keep · n⌋, at least 1; a hair is added, because 0.29 · 100 is 28.999….

    Example:
        >>> num_kept(100, 0.29)
        29
    """
    return max(1, int(keep * num_rows + 1e-9))
