"""When a monitor looks, and how closely, so that looking stays cheap."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias

from lightning_sgd._validation import expect

LookKind: TypeAlias = Literal["look", "glance"]

QUICK = 0.1
"""Seconds; below that every look is a full one."""
PLANNED = 0.8
"""Part of the budget that is planned for; the rest is for hooks at every batch, and for looks slower than the last."""


@dataclass(slots=True)
class LookSchedule:
    """Every so many steps or epochs, as far as the budget goes.

    The budget is a share of the training time so far. Whatever has been spent, the first look included, and what the
    next look is going to cost, by the last one of its kind, must stay within four fifths of it. At each tick of the
    interval there is

    - a full look, if the last one was ``full_every`` intervals ago or it takes less than 0.1 s, and there is enough,
    - else a glance, which takes what is cheap, if there is enough and glances have used up at most half of the budget,
    - else nothing.

    The first look is always full; where it was quick, the second one is tried without an estimate. Without a limit
    there is a full look at every tick.

    Attributes:
        every: Interval, in steps or epochs.
        max_overhead: Largest share of the training time for looking [s]; ``None`` spends whatever it costs.
        full_every: Intervals between full looks that are not quick.
        can_glance: Whether there is something cheaper than a full look.
        next_tick: When to decide again.
        begin: Count at the first look; ``None`` before it.
        last_full: Count at the last full look.
        spent: Seconds of all looks and glances.
        spent_on_glances: Seconds of all glances.
        look_cost: Seconds of the last full look.
        glance_cost: Seconds of the last glance; a first one is tried at no estimate at all.

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
    can_glance: bool = False
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
        """Whether there is something to decide after ``now`` steps or epochs."""
        return now >= self.next_tick

    @property
    def needs_time(self) -> bool:
        """Whether the decision depends on the time spent training."""
        return self.max_overhead is not None and self.begin is not None

    @property
    def glances_between(self) -> bool:
        """Whether full looks are too slow, after what is known now, to take one at every tick."""
        slow = self.look_cost > QUICK and self.full_every > 1
        return self.can_glance and self.max_overhead is not None and slow

    @property
    def enough_after(self) -> float:
        """Training time after which there is enough for some look, in seconds."""
        look = self._seconds_for_look()
        return min(look, self._seconds_for_glance()) if self.can_glance else look

    def choose(self, now: int, seconds: float, *, last: bool = False) -> LookKind | None:
        """How closely to look, if at all; if not, when to decide again is put off.

        Args:
            now: Steps or epochs so far.
            seconds: Training time so far, without looking.
            last: Whether training is over: then it is time for a full look, if there is enough.
        """
        if self.max_overhead is None or self.begin is None:
            return "look"
        full = last or not self.can_glance or self.look_cost <= QUICK
        full = full or now >= self.last_full + self.full_every * self.every
        if full and self._seconds_for_look() <= seconds:
            return "look"
        if self.can_glance and self._seconds_for_glance() <= seconds:
            return "glance"
        self._put_off(now, seconds)
        return None

    def record(self, rung: LookKind, now: int, cost: float) -> None:
        """Charge for a look, and plan the next decision one interval later.

        Args:
            rung: How close it was.
            now: Steps or epochs so far.
            cost: Seconds that it took.
        """
        self.begin = now if self.begin is None else self.begin
        self.next_tick = now + self.every
        self.spent += cost
        if rung == "look":
            self.look_cost, self.last_full = cost, now
        else:
            self.glance_cost = cost
            self.spent_on_glances += cost

    def state_dict(self) -> dict[str, Any]:
        """What has been spent, and when to decide again."""
        settings = ("every", "max_overhead", "full_every", "can_glance")
        return {key: value for key, value in asdict(self).items() if key not in settings}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on as :meth:`state_dict` says."""
        for key, value in state_dict.items():
            setattr(self, key, value)

    def reset(self) -> None:
        """Forget everything but the settings."""
        fresh = LookSchedule(self.every, self.max_overhead, self.full_every, self.can_glance)
        self.load_state_dict(fresh.state_dict())

    def _seconds_for_look(self) -> float:
        """Training time after which there is enough for a full look."""
        if self.max_overhead is None:
            return 0.0
        # A quick first look is mostly what happens once: libraries that load, memory that is allocated.
        knows_only_the_first = self.last_full == self.begin and self.look_cost <= QUICK
        estimate = 0.0 if knows_only_the_first else self.look_cost
        return (self.spent + estimate) / (PLANNED * self.max_overhead)

    def _seconds_for_glance(self) -> float:
        """Training time after which there is enough for a glance, and half of it left to full looks."""
        if self.max_overhead is None:
            return 0.0
        twice = 2 * (self.spent_on_glances + self.glance_cost)
        return max(self.spent + self.glance_cost, twice) / (PLANNED * self.max_overhead)

    def _put_off(self, now: int, seconds: float) -> None:
        """Decide again when there is enough, by the pace so far; at the next tick if that is not known."""
        assert self.begin is not None  # there is a first look before anything is put off
        missing = (self.enough_after - seconds) * (now - self.begin)
        intervals = math.ceil(missing / (seconds * self.every)) if seconds > 0 else 1
        self.next_tick = now + self.every * max(1, intervals)
