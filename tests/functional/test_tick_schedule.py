"""The schedule of monitors keeps its promises about time."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_sgd.functional.tick_schedule import TickSchedule


@given(
    every=st.integers(1, 1000),
    share=st.floats(1e-3, 1.0),
    cost=st.floats(1e-6, 10.0),
    pace=st.floats(1e-4, 10.0),
    now=st.integers(0, 10**6),
)
def test_looking_stays_below_its_share_and_no_more_is_lost_than_needed(
    every, share, cost, pace, now
):
    schedule = TickSchedule(every, share)
    schedule.record(now, cost, pace)
    interval = schedule.next_tick - now
    assert interval % every == 0
    assert cost <= interval * pace * share * (1 + 1e-9)
    if interval > every:
        assert cost > (interval - every) * pace * share * (1 - 1e-9)


def test_an_unknown_pace_does_not_stretch():
    schedule = TickSchedule(every=3, max_overhead=0.01)
    schedule.record(now=0, cost=100.0, seconds_per_count=None)
    assert [schedule.is_due(count) for count in (1, 2, 3, 4)] == [False, False, True, True]


def test_without_a_limit_the_interval_stays():
    schedule = TickSchedule(every=3, max_overhead=None)
    schedule.record(now=0, cost=100.0, seconds_per_count=1e-3)
    assert schedule.next_tick == 3


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
        TickSchedule(**settings)
