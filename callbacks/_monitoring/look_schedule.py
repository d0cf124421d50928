"""Decide when a monitor looks, and whether in full or cheaply, so that looking stays within its budget."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias

from lightning_sgd._validation import expect

LookKind: TypeAlias = Literal["look", "glance"]
"""A full look, or a cheap one; checkpoints hold these words."""

QUICK = 0.1
"""Seconds; a look that takes less than this is always a full one."""
PLANNED = 0.8
"""Share of the budget that is planned for. The rest pays for hooks at every batch and for unusually slow looks."""


@dataclass(slots=True)
class LookSchedule:
    """Schedule looks at a regular interval, as far as the budget allows.

    The budget is a share of the training time so far. The seconds spent on all looks, plus the expected cost of the
    next one, must stay within four fifths of it. The expected cost is that of the last look of the same kind. After
    each interval there is

    - a full look, if it can be paid, and if the last one was ``full_every`` intervals ago or full looks take less than
      0.1 s;
    - else a cheap look, if it can be paid, and if cheap looks have used at most half of the budget;
    - else none.

    The first look is always full. If it took less than 0.1 s, the second one is made without an estimate. Without a
    budget there is a full look after every interval.

    Attributes:
        every: Interval, in steps or epochs.
        max_overhead: Largest share of the training time for looking; ``None`` sets no limit.
        full_every: Intervals between full looks that take 0.1 s or more.
        has_cheap_look: Whether the monitor has a cheap look.
        next_tick: Count of steps or epochs at which to decide again.
        begin: Count at the first look; ``None`` before it.
        last_full: Count at the last full look.
        spent: Seconds of all looks, full and cheap.
        spent_on_glances: Seconds of all cheap looks. This name and the next but one are keys in checkpoints.
        look_cost: Seconds of the last full look.
        glance_cost: Seconds of the last cheap look; 0 before the first one, which is made without an estimate.

    Example:
        >>> schedule = LookSchedule(every=10, max_overhead=0.01)
        >>> schedule.choose(now=0, seconds=0.0)
        'look'
        >>> schedule.record("look", now=0, cost=0.5)
        >>> schedule.choose(now=10, seconds=10.0)  # of which 0.08 s may be spent
        >>> schedule.next_tick  # 0.5 s for the first look and 0.5 s for the next are there after 125 s
        130
    """

    every: int
    max_overhead: float | None
    full_every: int = 1
    has_cheap_look: bool = False
    next_tick: int = 0
    begin: int | None = None
    last_full: int = 0
    spent: float = 0.0
    spent_on_glances: float = 0.0
    look_cost: float = 0.0
    glance_cost: float = 0.0

    def __post_init__(self) -> None:
        remedy = "Give a number of steps or epochs."
        expect(self.every >= 1, "every_n_steps or every_n_epochs", "at least 1", self.every, remedy)
        share = self.max_overhead
        remedy = "0.01 is one percent; None keeps the interval whatever it costs."
        expect(share is None or 0 < share <= 1, "max_overhead", "in (0, 1]", share, remedy)

    def is_due(self, now: int) -> bool:
        """Return whether it is time to decide, after ``now`` steps or epochs."""
        return now >= self.next_tick

    @property
    def needs_time(self) -> bool:
        """Whether the decision depends on the training time."""
        return self.max_overhead is not None and self.begin is not None

    @property
    def alternates(self) -> bool:
        """Whether full looks are so slow that there are cheap ones between them."""
        slow = self.look_cost > QUICK and self.full_every > 1
        return self.has_cheap_look and self.max_overhead is not None and slow

    @property
    def enough_after(self) -> float:
        """Training time, in seconds, after which the budget pays for a look of some kind."""
        look = self._seconds_for_look()
        return min(look, self._seconds_for_cheap_look()) if self.has_cheap_look else look

    def choose(self, now: int, seconds: float, *, last: bool = False) -> LookKind | None:
        """Choose the kind of look; if none can be paid, return ``None`` and postpone the next decision.

        Args:
            now: Steps or epochs so far.
            seconds: Training time so far, without looks.
            last: Whether training has ended, so that a full look is due.
        """
        if self.max_overhead is None or self.begin is None:
            return "look"
        full = last or not self.has_cheap_look or self.look_cost <= QUICK
        full = full or now >= self.last_full + self.full_every * self.every
        if full and self._seconds_for_look() <= seconds:
            return "look"
        if self.has_cheap_look and self._seconds_for_cheap_look() <= seconds:
            return "glance"
        self._postpone(now, seconds)
        return None

    def record(self, kind: LookKind, now: int, cost: float) -> None:
        """Charge ``cost`` seconds for a look, and plan the next decision one interval later."""
        self.begin = now if self.begin is None else self.begin
        self.next_tick = now + self.every
        self.spent += cost
        if kind == "look":
            self.look_cost, self.last_full = cost, now
        else:
            self.glance_cost = cost
            self.spent_on_glances += cost

    def state_dict(self) -> dict[str, Any]:
        """Return what has been spent, and when to decide again."""
        settings = ("every", "max_overhead", "full_every", "has_cheap_look")
        return {key: value for key, value in asdict(self).items() if key not in settings}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        for key, value in state_dict.items():
            setattr(self, key, value)

    def reset(self) -> None:
        """Restore the state before the first look."""
        fresh = LookSchedule(self.every, self.max_overhead, self.full_every, self.has_cheap_look)
        self.load_state_dict(fresh.state_dict())

    def _seconds_for_look(self) -> float:
        """Training time, in seconds, after which the budget pays for a full look."""
        if self.max_overhead is None:
            return 0.0
        # Most of a quick first look is work that happens once: loading libraries, allocating memory.
        knows_only_the_first = self.last_full == self.begin and self.look_cost <= QUICK
        estimate = 0.0 if knows_only_the_first else self.look_cost
        return (self.spent + estimate) / (PLANNED * self.max_overhead)

    def _seconds_for_cheap_look(self) -> float:
        """Training time, in seconds, after which the budget pays for a cheap look and leaves half to full ones."""
        if self.max_overhead is None:
            return 0.0
        twice = 2 * (self.spent_on_glances + self.glance_cost)
        return max(self.spent + self.glance_cost, twice) / (PLANNED * self.max_overhead)

    def _postpone(self, now: int, seconds: float) -> None:
        """Decide again when the budget will suffice, by the pace so far; after one interval if that is not known."""
        assert self.begin is not None  # the first look is always made
        missing = (self.enough_after - seconds) * (now - self.begin)
        intervals = math.ceil(missing / (seconds * self.every)) if seconds > 0 else 1
        self.next_tick = now + self.every * max(1, intervals)
