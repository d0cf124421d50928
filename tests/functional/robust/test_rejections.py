"""Who is rejected: by hand, for rules with weights, for rules without, and for those that pick one worker."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_sgd.functional.robust.rejections import RejectionTally, rejected

NAN = math.nan


@pytest.mark.parametrize(
    ("dropped", "weights", "distances", "expected"),
    [
        ([], [0.3, 0.3, 0.3, 0.1], None, []),
        ([], [0.33, 0.33, 0.33, 0.01], None, [3]),
        ([1], [0.5, 0.0, 0.25, 0.25], None, [1]),
        ([], None, [1.0, 1.2, 0.9, 3.5], [3]),
        ([2], None, [1.0, 1.2, NAN, 1.0], [2]),
        ([], [0.0, 1.0, 0.0, 0.0], [1.0, 0.0, 1.1, 9.0], [3]),  # Krum gives all weight to one
        ([0, 1], [0.0, 0.0, 0.5, 0.5], [NAN, NAN, 1.0, 1.0], [0, 1]),
    ],
)
def test_who_is_rejected(dropped, weights, distances, expected):
    weights = None if weights is None else torch.tensor(weights)
    distances = None if distances is None else torch.tensor(distances)
    flags = rejected(4, dropped, weights, distances)
    assert [worker for worker in range(4) if flags[worker]] == expected


def test_without_weights_and_distances_nothing_is_known():
    assert rejected(3, [], None, None) is None
    assert rejected(3, [], torch.tensor([1.0, 0.0, 0.0]), None) is None
    assert rejected(3, [2], None, None) == [False, False, True]


def test_shares_are_counted_and_forgotten_slowly():
    tally = RejectionTally(horizon=4)
    for step in range(8):
        tally.add([0.0, float(step < 4)])
    assert tally.shares() == [0.0, 0.5]
    assert tally.recent[1] == pytest.approx(
        0.75**4
    )  # the mean of the first four, then ever less of it


def test_suspects_are_named_after_a_while_and_only_if_they_stand_out():
    tally = RejectionTally(horizon=3)
    for _ in range(2):
        tally.add([0.0, 0.0, 1.0])
    assert tally.suspects(0.5) == []
    tally.add([0.0, 0.0, 1.0])
    assert tally.suspects(0.5) == [2]
    everybody = RejectionTally(horizon=1)
    everybody.add([1.0, 1.0, 1.0])
    assert everybody.suspects(0.5) == []


def test_another_number_of_workers_begins_anew():
    tally = RejectionTally(horizon=3)
    tally.add([1.0, 0.0])
    tally.add([0.0, 0.0, 1.0])
    assert (tally.num_steps, tally.shares()) == (1, [0.0, 0.0, 1.0])
