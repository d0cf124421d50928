"""The base of all rules: what is dropped, refused, mixed, reported and composed."""

from __future__ import annotations

import pytest
import torch

from lightning_sgd.aggregation import (
    NNM,
    CoordinateMedian,
    Mean,
    PreAggregated,
    SpectralFilter,
    TrimmedMean,
    get_aggregator,
)

E5 = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0], [1.0, 1.0], [10.0, 10.0]])


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (Mean(), (2.4, 2.6)),
        (CoordinateMedian(1), (1.0, 1.0)),
        (TrimmedMean(1), (2 / 3, 1.0)),
        (SpectralFilter(1, stop="agnostic"), (0.505433, 0.770320)),
        (get_aggregator("nnm+mean", 1), (1.0, 1.25)),
        (get_aggregator("nnm+median", 1), (0.5, 0.75)),
    ],
    ids=repr,
)
def test_five_rows_by_hand(rule, expected):
    assert rule(E5.double()).tolist() == pytest.approx(expected, abs=1e-6)
    assert rule(E5).tolist() == pytest.approx(expected, abs=1e-6)
    assert rule(list(E5)).tolist() == pytest.approx(expected, abs=1e-6)


def test_rows_that_are_not_finite_are_dropped_and_named():
    rows = torch.cat([E5[:4], torch.tensor([[torch.nan, 0.0], [0.0, torch.inf], [1e30, 0.0]])])
    rule = Mean(num_byzantine=3)
    assert torch.equal(rule(rows), E5[:4].mean(dim=0))
    assert rule.report.dropped == (4, 5, 6)
    with pytest.raises(ValueError, match=r"Rows \[4, 5\] hold NaN or infinity"):
        Mean(num_byzantine=1)(rows)


@pytest.mark.parametrize("num_byzantine", [2, 3])
def test_half_of_the_rows_cannot_be_faulty(num_byzantine):
    rule = CoordinateMedian(num_byzantine)
    with pytest.raises(ValueError, match="Of 4 workers at most 1 may be faulty"):
        rule(E5[:4])
    with pytest.raises(ValueError, match="at most 1 may be faulty"):
        PreAggregated([NNM()], rule).check(4)


def test_names_compose_and_say_what_is_wrong():
    assert repr(get_aggregator("nnm+trmean", 2)) == "NNM() + TrimmedMean(num_byzantine=2)"
    rule = Mean()
    assert get_aggregator(rule, 0) is rule
    assert get_aggregator("filter(stop='threshold', sigma0=2.0)", 1).sigma0 == 2.0
    for wrong in (
        "medain",
        "median+nnm",
        "nnm+",
        "nnm(3)+mean",
        "mean(speed=3)",
        "__import__('os')",
    ):
        with pytest.raises(ValueError, match="Expected `aggregator` to"):
            get_aggregator(wrong, 1)
