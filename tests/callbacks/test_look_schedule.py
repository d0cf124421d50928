"""The schedule of monitors keeps its promises about time."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_sgd.callbacks._monitoring.look_schedule import LookSchedule

EIGHTH = 1 / 8 / 0.8  # of which four fifths are planned for


def simulate(schedule, num_ticks, seconds_per_count=1.0, look=0.5, cheap=0.125):
    """The counts of full looks and of cheap ones, where each takes a fixed time."""
    costs, counts = {"look": look, "glance": cheap}, {"look": [], "glance": []}
    for now in range(num_ticks):
        if schedule.is_due(now):
            kind = schedule.choose(now, now * seconds_per_count)
            if kind is not None:
                schedule.record(kind, now, costs[kind])
                counts[kind].append(now)
    return counts["look"], counts["glance"]


def test_a_schedule_by_hand():
    # In eighths of a second: a count earns 1, a full look costs 4, a cheap one 1, the first of them unknown. From 0:
    # −4 is paid back at 4. Cheap looks may have half of the budget g: at 9 the fifth would make 2·5 > 9. The full
    # look is wanted from 10 on, and paid at 14, when 10 have been spent, 6 of them by cheap looks.
    schedule = LookSchedule(every=1, max_overhead=EIGHTH, full_every=10, has_cheap_look=True)
    looks, cheap_looks = simulate(schedule, 26)
    assert looks == [0, 14, 24]
    assert cheap_looks == [4, 6, 7, 8, 10, 12, 15, 16, 18, 20, 22, 25]
    assert schedule.spent == (3 * 4 + 12) / 8
    assert schedule.spent_on_glances == 12 / 8


def test_only_full_looks_by_hand():
    # Spent so far and as much again: 8 after the first, then 4 more for each.
    looks, cheap_looks = simulate(LookSchedule(every=1, max_overhead=EIGHTH), 26)
    assert (looks, cheap_looks) == ([0, 8, 12, 16, 20, 24], [])


def test_ticks_are_multiples_of_the_interval():
    looks, _ = simulate(LookSchedule(every=3, max_overhead=EIGHTH), 26)
    assert looks == [0, 9, 12, 18, 21, 24]


def test_quick_looks_are_always_full():
    # On a small network nobody should have to wait ten epochs for the rank.
    schedule = LookSchedule(every=1, max_overhead=0.5, full_every=10, has_cheap_look=True)
    looks, cheap_looks = simulate(schedule, 5, look=0.09, cheap=0.05)
    assert (looks, cheap_looks) == ([0, 1, 2, 3, 4], [])
    assert not schedule.alternates


def test_affordable_but_slow_looks_are_full_every_so_often():
    schedule = LookSchedule(every=2, max_overhead=1.0, full_every=3, has_cheap_look=True)
    looks, cheap_looks = simulate(schedule, 15)
    assert (looks, cheap_looks) == ([0, 6, 12], [2, 4, 8, 10, 14])
    assert schedule.alternates


def test_the_last_look_is_full_where_there_is_enough():
    schedule = LookSchedule(every=1, max_overhead=EIGHTH, full_every=10, has_cheap_look=True)
    schedule.record("look", 0, 0.5)
    assert schedule.choose(8, 8.0, last=False) == "glance"
    assert schedule.choose(8, 8.0, last=True) == "look"
    assert schedule.choose(8, 7.9, last=True) == "glance"
    assert schedule.choose(8, 3.9, last=True) is None


@given(
    every=st.integers(1, 20),
    share=st.floats(1e-2, 1.0),
    look=st.floats(0.2, 10.0),
    cheaper=st.floats(1.0, 50.0),
    pace=st.floats(1e-2, 10.0),
    full_every=st.integers(1, 20),
)
def test_the_budget_is_kept_and_full_looks_are_never_starved(
    every, share, look, cheaper, pace, full_every
):
    schedule = LookSchedule(every, share, full_every, has_cheap_look=True)
    num_ticks, cheap = 1000, look / cheaper
    looks, cheap_looks = simulate(schedule, num_ticks, pace, look, cheap)
    made = sorted([(now, look) for now in looks] + [(now, cheap) for now in cheap_looks])
    spent = 0.0
    for now, cost in made:
        spent += cost
        # The first cheap look is made to learn what it costs.
        slack = cheap if cheap_looks and now == cheap_looks[0] else 0.0
        assert now == 0 or spent <= 0.8 * share * now * pace * (1 + 1e-9) + slack
        assert now % every == 0
    assert all(np.diff(looks) >= every * full_every)
    # A full look comes once half of the budget, a tick ago, and the ladder allow it.
    earned = 0.8 * share * pace * (num_ticks - 2 * every) / 2 - cheap
    by_budget, by_ladder = earned / look - 1, (num_ticks - every) / (every * full_every)
    if by_ladder > 1 and by_budget > 1:
        assert len(looks) >= 2


def test_without_a_limit_every_look_is_made_and_full():
    schedule = LookSchedule(every=3, max_overhead=None, full_every=10, has_cheap_look=True)
    assert simulate(schedule, 10, look=100.0) == ([0, 3, 6, 9], [])
    assert not schedule.needs_time


def test_the_state_brings_back_everything_but_the_settings():
    schedule = LookSchedule(every=1, max_overhead=EIGHTH, full_every=10, has_cheap_look=True)
    simulate(schedule, 13)
    other = LookSchedule(every=1, max_overhead=EIGHTH, full_every=10, has_cheap_look=True)
    other.load_state_dict(schedule.state_dict())
    assert other == schedule
    other.reset()
    assert other == LookSchedule(every=1, max_overhead=EIGHTH, full_every=10, has_cheap_look=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every": 0, "max_overhead": 0.1}, "Expected `every_n_steps or every_n_epochs` to be at"),
        ({"every": 1, "max_overhead": 0.0}, r"Expected `max_overhead` to be in \(0, 1\], got 0\.0"),
        ({"every": 1, "max_overhead": 2.0}, r"Expected `max_overhead` to be in \(0, 1\], got 2\.0"),
    ],
)
def test_impossible_schedules_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        LookSchedule(**settings)


def test_a_quick_first_look_is_no_estimate_of_the_next():
    # It is slow because libraries load; by its cost alone, a short training would never be looked at again.
    schedule = LookSchedule(every=1, max_overhead=0.01)
    schedule.record("look", now=0, cost=0.02)
    assert schedule.choose(now=1, seconds=2.49) is None  # 0.02 s are paid for after 2.5 s
    assert schedule.choose(now=2, seconds=2.5) == "look"
    schedule.record("look", now=2, cost=0.02)
    assert (
        schedule.choose(now=3, seconds=7.49) is None
    )  # now the next one is expected to cost as much
    assert schedule.choose(now=4, seconds=7.5) == "look"


def test_a_slow_first_look_is_an_estimate_of_the_next():
    schedule = LookSchedule(every=1, max_overhead=0.01)
    schedule.record("look", now=0, cost=0.2)
    assert schedule.choose(now=1, seconds=49.0) is None
    assert schedule.choose(now=2, seconds=50.0) == "look"
