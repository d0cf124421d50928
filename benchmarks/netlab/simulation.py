"""Simulate the clocks of ranks that compute, wait for each other and communicate."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from .training import SLOW_STEPS

Times: TypeAlias = "np.ndarray[tuple[int, int], np.dtype[np.float64]]"
"""Seconds of computation by rank and step."""


@dataclass(frozen=True)
class Pattern:
    """The ranks that wait for each other.

    Attributes:
        kind: Nobody; everybody; one peer, another one in every step; or everybody, one round later.
        period: Steps from one exchange with everybody to the next [H].
    """

    kind: Literal["none", "all", "peer", "late"]
    period: float = 1


PATTERNS = {
    "no exchange": Pattern("none"),
    "DDP": Pattern("all"),
    "Local SGD, H = 4": Pattern("all", 4),
    "Local SGD, H = 16": Pattern("all", 16),
    "gossip, one peer": Pattern("peer", math.inf),
    "Gossip-PGA, H = 8": Pattern("peer", 8),
    "Overlap Local-SGD, H = 2": Pattern("late", 2),
    "Overlap Local-SGD, H = 8": Pattern("late", 8),
}
"""By label of the lab."""


@dataclass(frozen=True)
class Costs:
    """Seconds of an exchange after its last rank has arrived.

    Attributes:
        all_reduce: Mean over all ranks.
        swap: With one peer.
    """

    all_reduce: float
    swap: float


def slow_steps(num_ranks: int, num_steps: int) -> np.ndarray:
    """Return the slow steps of each rank, by the same draws as in the lab.

    Args:
        num_ranks: Rows.
        num_steps: Columns.
    """
    draws = (random.Random(rank) for rank in range(num_ranks))
    return np.array([[rng.random() < SLOW_STEPS for _ in range(num_steps)] for rng in draws])


def mean_step(pattern: Pattern, times: Times, costs: Costs, warm_up: int) -> float:
    """Return the seconds per step after the warm-up, averaged over the ranks.

    Args:
        pattern: Who waits for whom.
        times: Seconds of computation, by rank and step.
        costs: Of exchanges.
        warm_up: Number of steps that do not count.

    Example:
        Two ranks take turns in being slow: who meets in every step waits every time, who meets every other does not.

        >>> times = np.array([[1.0, 2.0] * 4, [2.0, 1.0] * 4])
        >>> [mean_step(Pattern("all", h), times, Costs(0.5, 0.0), 0) for h in (1, 2)]
        [2.5, 1.75]
        >>> mean_step(Pattern("late", 2), times, Costs(0.5, 0.0), 0)
        1.5
    """
    num_ranks, num_steps = times.shape
    clock, arrival, begin = np.zeros(num_ranks), -math.inf, 0.0
    for step in range(num_steps):
        if step == warm_up:
            begin = float(clock.mean())
        clock = clock + times[:, step]
        meets = pattern.kind != "none" and (step + 1) % pattern.period == 0
        if pattern.kind == "late":
            if meets:
                clock = np.maximum(clock, arrival)
                arrival = float(clock.max()) + costs.all_reduce
        elif meets:
            clock = np.full(num_ranks, clock.max() + costs.all_reduce)
        elif pattern.kind == "peer":
            peer = np.roll(clock, _offset(step, num_ranks))
            clock = np.maximum(clock, peer) + costs.swap
    return float(clock.mean() - begin) / (num_steps - warm_up)


def _offset(step: int, num_ranks: int) -> int:
    return 1 << step % max(1, math.ceil(math.log2(num_ranks)))
