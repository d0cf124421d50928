"""Find which workers a robust rule rejects, and count how often."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

SMALL_WEIGHT = 0.1
"""A worker with less than this fraction of the median weight counts as rejected."""
FAR = 3.0
"""A worker farther from the result than this multiple of the median distance counts as rejected."""


def rejected(
    num_workers: int,
    dropped: Collection[int],
    weights: Tensor | None,
    distances: Tensor | None,
) -> list[bool] | None:
    """Decide for each worker whether a rule rejected it in a step; ``None`` if that cannot be known.

    A worker is rejected if its row was dropped, or if it has less than a tenth of the median weight. If half of the
    workers have no weight at all, as with Krum, or there are no weights, it is rejected if it is more than three times
    as far from the result as the median worker.

    Args:
        num_workers: Number of workers [N].
        dropped: Numbers of the workers whose rows were dropped.
        weights: Share of each worker in the result, of shape (N,).
        distances: Distance of each worker from the result, of shape (N,); NaN if its row is not finite.

    Example:
        >>> rejected(4, [], torch.tensor([0.3, 0.4, 0.3, 0.0]), None)
        [False, False, False, True]
        >>> rejected(4, [1], None, torch.tensor([1.0, torch.nan, 1.5, 90.0]))
        [False, True, False, True]
    """
    flags = [worker in dropped for worker in range(num_workers)]
    others = [worker for worker in range(num_workers) if not flags[worker]]
    # Krum gives all weight to one row: a median weight of 0 tells nothing about single workers.
    is_telling = weights is not None and float(weights[others].median()) > 0
    if weights is not None and is_telling:
        suspects = weights < SMALL_WEIGHT * weights[others].median()
    elif distances is not None:
        suspects = distances > FAR * distances[others].nanmedian()
    else:
        return flags if dropped else None
    return [flag or bool(suspect) for flag, suspect in zip(flags, suspects, strict=True)]


def by_rank(values: Sequence[float], num_ranks: int) -> list[float]:
    """Average over the workers of each rank.

    Args:
        values: One value per worker, rank by rank.
        num_ranks: Number of ranks.

    Example:
        >>> by_rank([1.0, 0.0, 1.0, 1.0], num_ranks=2)
        [0.5, 1.0]
    """
    each = len(values) // num_ranks
    return [sum(values[rank * each : (rank + 1) * each]) / each for rank in range(num_ranks)]


@dataclass
class RejectionTally:
    """Rejections of each worker, in total and recently.

    Attributes:
        horizon: Number of steps over which the recent share is averaged exponentially.
        num_steps: Number of steps in which rejections could be known.
        counts: Number of rejections, by worker.
        recent: Recent share of steps with a rejection, by worker.
    """

    horizon: int
    num_steps: int = 0
    counts: list[float] = field(default_factory=list)
    recent: list[float] = field(default_factory=list)

    def add(self, flags: Sequence[float]) -> None:
        """Add one step; start anew if the number of workers has changed.

        Args:
            flags: For each worker, 1 if it was rejected; a fraction if only some of its gradients were.
        """
        if len(flags) != len(self.counts):
            self.num_steps, self.counts = 0, [0.0] * len(flags)
            self.recent = [0.0] * len(flags)
        self.num_steps += 1
        # A plain mean until the horizon is reached: from zero the average would start too low.
        share = 1 / min(self.num_steps, self.horizon)
        self.counts = [count + flag for count, flag in zip(self.counts, flags, strict=True)]
        self.recent = [
            old + share * (flag - old) for old, flag in zip(self.recent, flags, strict=True)
        ]

    def shares(self) -> list[float]:
        """Return the share of all steps in which each worker was rejected."""
        return [count / max(self.num_steps, 1) for count in self.counts]

    def suspects(self, share: float) -> list[int]:
        """List the workers that were recently rejected often, and twice as often as the median worker.

        Args:
            share: Smallest share of steps.
        """
        if self.num_steps < self.horizon or not self.recent:
            return []
        usual = float(torch.tensor(self.recent).median())
        # A rule such as Krum rejects most workers in every step; only more rejections than usual are suspicious.
        enough = max(share, min(2 * usual, 1.0))
        return [worker for worker, rate in enumerate(self.recent) if rate >= enough > usual]
