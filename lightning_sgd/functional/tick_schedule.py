"""When a monitor looks, so that looking stays cheap."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lightning_sgd._validation import expect


@dataclass(slots=True)
class TickSchedule:
    """Every so many steps or epochs, and more rarely when a look costs too much.

    After a look that took c seconds, at t seconds of training per step, the next one comes after
    ``every · ceil(c / (every · t · max_overhead))`` steps: the least multiple of the interval that keeps looking below
    its share of the time.

    Attributes:
        every: Wanted interval, in steps or epochs.
        max_overhead: Largest share of the training time for looking; ``None`` keeps the interval whatever it costs.
        next_tick: When the next look is due.
        stretch: By how much the interval has grown.

    Example:
        >>> schedule = TickSchedule(every=10, max_overhead=0.01)
        >>> schedule.is_due(0)
        True
        >>> schedule.record(now=0, cost=0.5, seconds_per_count=1.0)
        >>> schedule.next_tick, schedule.stretch
        (50, 5)
    """

    every: int
    max_overhead: float | None
    next_tick: int = 0
    stretch: int = 1

    def __post_init__(self) -> None:
        remedy = "Give a number of steps or epochs."
        expect(self.every >= 1, "every_n_steps or every_n_epochs", "at least 1", self.every, remedy)
        share = self.max_overhead
        remedy = "0.01 is one percent; None keeps the interval whatever it costs."
        expect(share is None or 0 < share <= 1, "max_overhead", "in (0, 1]", share, remedy)

    def is_due(self, now: int) -> bool:
        """Whether it is time to look after ``now`` steps or epochs."""
        return now >= self.next_tick

    def record(self, now: int, cost: float, seconds_per_count: float | None) -> None:
        """Plan the next look.

        Args:
            now: Steps or epochs so far.
            cost: Seconds that the last look took.
            seconds_per_count: Seconds of training per step or epoch, without looking; ``None`` if not known yet.
        """
        if seconds_per_count and self.max_overhead is not None:
            budget = self.every * seconds_per_count * self.max_overhead
            self.stretch = max(1, math.ceil(cost / budget))
        self.next_tick = now + self.every * self.stretch
