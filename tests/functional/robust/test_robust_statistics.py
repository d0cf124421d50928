"""Statistics of what a few ranks say: NumPy as the oracle, and what one wrong rank can do: nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_sgd.functional.robust import robust_statistics
from lightning_sgd.functional.robust.robust_statistics import (
    finite_median,
    is_majority,
    majority,
    most_frequent,
    worker_momentum,
)

NUMBERS = st.floats(-1e6, 1e6) | st.sampled_from([float("nan"), float("inf"), -float("inf")])


@given(st.lists(st.lists(NUMBERS, min_size=3, max_size=3), min_size=1, max_size=6))
def test_the_median_is_numpys_of_the_finite_numbers(rows):
    ours = finite_median(torch.tensor(rows, dtype=torch.float64))
    for column, value in zip(np.array(rows).T, ours.tolist(), strict=True):
        finite = column[np.isfinite(column)]
        if len(finite) == 0:
            assert np.isnan(value)
        else:
            rounding = 1e-15 * np.abs(finite).max()  # of the two in the middle
            assert value == pytest.approx(np.median(finite), rel=1e-12, abs=rounding)


def test_long_rows_go_by_blocks(monkeypatch):
    # torch refuses quantiles of more than 16 million elements.
    rows = torch.randn(3, 2, 11, dtype=torch.float64)
    monkeypatch.setattr(robust_statistics, "BLOCK", 4)
    assert torch.equal(finite_median(rows), rows.median(dim=0).values)


def test_equal_numbers_keep_every_bit():
    # Buffers that never change must come out as they are, on any number of ranks.
    values = torch.randn(1000)
    for num_ranks in (2, 3, 4, 7):
        rows = values.double().expand(num_ranks, -1)
        assert torch.equal(finite_median(rows).float(), values)


def test_whole_numbers():
    rows = torch.tensor([[5, 0], [5, 1], [900, 1]])
    assert most_frequent(rows).tolist() == [5, 1]


@pytest.mark.parametrize(
    ("votes", "expected"),
    [([True, True, False], True), ([True, False], False), ([False, False, True], False)],
)
def test_majorities(votes, expected):
    assert is_majority(votes) is expected


def test_what_no_majority_says_is_nothing():
    assert majority([3, 3, 4]) == 3
    assert majority([3, 4]) is None
    assert majority([3, 3, 4, 4]) is None


def test_momentum_by_hand():
    momentum = torch.zeros(2, 1)
    for gradient, expected in [((1.0, 2.0), (0.1, 0.2)), ((3.0, 0.0), (0.39, 0.18))]:
        sent = worker_momentum(momentum, torch.tensor(gradient)[:, None], 0.9)
        torch.testing.assert_close(sent.flatten(), torch.tensor(expected))


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_one_overflow_does_not_stay_in_the_momentum(broken):
    momentum = torch.tensor([[1.0, 1.0], [1.0, 1.0]])
    sent = worker_momentum(momentum, torch.tensor([[2.0, broken], [2.0, 2.0]]), 0.5)
    assert not sent[0].isfinite().all()
    assert torch.equal(momentum, torch.tensor([[1.0, 1.0], [1.5, 1.5]]))
    assert torch.equal(sent[1], momentum[1])
