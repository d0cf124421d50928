"""What the last line of a monitor says, for histories made by hand."""

from __future__ import annotations

import pytest
import torch

from lightning_sgd.callbacks.rank_monitor.history import (
    RankHistory,
    describe_falls,
    find_fall,
    mean_over_alive,
)


@pytest.mark.parametrize(
    ("values", "half_time"),
    [
        ([8, 8, 8, 2], 30),
        ([8, 2, 2, 2], 10),
        ([8, 2, 8, 2], 30),  # it rose again in between
        ([8, 5, 5, 2], 10),  # exactly half counts
        ([2, 4, 7, 8], 20),  # a rise, likewise
        ([5, 5, 5, 5], 0),
    ],
)
def test_half_of_a_fall(values, half_time):
    fall = find_fall([0, 10, 20, 30], torch.tensor(values, dtype=torch.float32))
    assert fall == (values[0], values[-1], half_time)


def test_share_of_a_fall():
    assert find_fall([0, 1], torch.tensor([8.0, 2.0])).share == 0.75
    assert find_fall([0, 1], torch.tensor([0.0, 2.0])).share == 0.0


def test_dead_layers_do_not_count_even_if_they_are_not_finite():
    values = torch.tensor([[1.0, float("nan"), 3.0], [2.0, float("inf"), 6.0]])
    alive = torch.tensor([True, False, True])
    assert mean_over_alive(values, alive).tolist() == [2.0, 4.0]
    assert mean_over_alive(values, torch.zeros(3, dtype=torch.bool)).isnan().all()


def test_the_line_names_the_deepest_fall_and_the_dead():
    values = torch.tensor([[60.0, 50.0, 9.0], [50.0, 20.0, 9.0], [48.0, 10.0, 0.0]])
    alive = torch.tensor([True, True, False])
    line = describe_falls("effective rank", ["a", "b", "c"], [0, 100, 200], values, alive)
    assert line == (
        "effective rank of 2 matrices went from 55.0 to 29.0 in 200 steps; "
        "most in b, from 50.0 to 10.0, half of it by step 100; dead: c"
    )


def test_the_line_when_nothing_happened_and_when_all_are_dead():
    values = torch.tensor([[60.0], [59.9]])
    one = torch.tensor([True])
    line = describe_falls("effective rank", ["a"], [0, 5], values, one)
    assert line.endswith("in 5 steps; none fell by more than 1 %")
    assert describe_falls("effective rank", ["a"], [0, 5], values, ~one) == "dead: a"


NAN = float("nan")


def history(*entries):
    """Of one matrix: step, norm, stable and effective rank."""
    made = RankHistory(
        keys=("frobenius_norm", "stable_rank", "effective_rank"),
        cheap=("frobenius_norm", "stable_rank"),
    )
    for step, norm, stable, effective in entries:
        table = torch.tensor([[norm], [stable], [effective]])
        made.add(step, table, full=effective == effective)
    return made


def test_the_line_is_about_full_looks_where_there_are_two():
    made = history((0, 1.0, 4.0, 8.0), (5, 1.0, 3.0, NAN), (9, 1.0, 2.0, 6.0), (12, 1.0, 2.0, NAN))
    assert made.headline().times == [0, 9]
    expected = "effective rank of 1 matrices went from 8.0 to 6.0 in 9 steps"
    assert made.describe(["a"], 9).startswith(expected)
    assert made.describe(["a"], 12).endswith(
        "half of it by step 9, as of step 9 of 12: `max_overhead` allowed no full look since"
    )


def test_the_line_is_about_the_stable_rank_where_only_that_has_a_history():
    made = history((0, 1.0, 4.0, 8.0), (5, 1.0, 3.0, NAN))
    expected = "stable rank of 1 matrices went from 4.0 to 3.0 in 5 steps"
    assert made.describe(["a"], 5).startswith(expected)


def test_a_matrix_that_is_not_finite_at_a_cheap_look_is_dead():
    made = history((0, 1.0, 4.0, 8.0), (5, NAN, NAN, NAN))
    assert made.describe(["a"], 5) == "dead: a"
    assert made.alive(made.tables[0]).tolist() == [True]


def test_all_measures_take_the_place_of_the_cheap_ones_at_the_same_step():
    made = history((0, 1.0, 4.0, 8.0), (5, 1.0, 3.0, NAN))
    assert made.add(5, torch.tensor([[1.0], [3.0], [6.0]]), full=True)
    assert (made.times, made.full) == ([0, 5], [True, True])
    assert made.add(5, torch.tensor([[1.0], [3.0], [NAN]]), full=False)
    assert made.headline().values.flatten().tolist() == [8.0, 6.0]
