"""The history of a monitor: one entry per step, which survives a checkpoint."""

from __future__ import annotations

from lightning_sgd.callbacks._monitoring.history import TimeSeries


def test_a_step_is_recorded_once():
    history = TimeSeries()
    assert history.add(3, {"a": 1.0, "b": 2.0})
    assert not history.add(3, {"a": 9.0, "b": 9.0})
    assert history.add(5, {"a": 4.0, "b": 5.0})
    assert (history.times, history.values) == ([3, 5], {"a": [1.0, 4.0], "b": [2.0, 5.0]})
    assert history.latest() == {"a": 4.0, "b": 5.0}


def test_a_checkpoint_shares_nothing_with_the_history():
    # What is written to a checkpoint must not grow while another thread writes it to disk.
    history = TimeSeries([3], {"a": [1.0]})
    state = history.state_dict()
    restored = TimeSeries.from_state(state)
    history.add(5, {"a": 2.0})
    assert state == {"times": [3], "values": {"a": [1.0]}}
    restored.add(7, {"a": 3.0})
    assert state == {"times": [3], "values": {"a": [1.0]}}
    assert restored == TimeSeries([3, 7], {"a": [1.0, 3.0]})
