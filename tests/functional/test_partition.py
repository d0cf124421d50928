"""Parts of a data set: equal, disjoint, and as skewed as asked."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_sgd.functional.partition import partition_by_label


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@st.composite
def problems(draw):
    labels = draw(st.lists(st.integers(0, 9), min_size=1, max_size=60))
    num_parts = draw(st.integers(1, len(labels)))
    skew = draw(st.floats(0.0, 1.0))
    return torch.tensor(labels), num_parts, skew


@given(problems(), st.integers(0, 99))
def test_parts_are_disjoint_and_equal_in_size(problem, seed):
    # Ranks with different numbers of batches would wait for each other forever.
    labels, num_parts, skew = problem
    parts = partition_by_label(labels, num_parts, skew, generator(seed))
    assert [len(part) for part in parts] == [len(labels) // num_parts] * num_parts
    together = torch.cat(parts)
    assert len(together.unique()) == len(together)
    assert together.min() >= 0
    assert together.max() < len(labels)


@given(problems(), st.integers(0, 99))
def test_the_same_generator_gives_the_same_parts(problem, seed):
    # Every rank computes the whole partition and takes its own part.
    labels, num_parts, skew = problem
    before = torch.get_rng_state()
    twice = [partition_by_label(labels, num_parts, skew, generator(seed)) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*twice, strict=True))
    assert torch.equal(torch.get_rng_state(), before)


@given(problems())
def test_full_skew_cuts_the_sorted_labels(problem):
    labels, num_parts, _ = problem
    parts = [labels[part] for part in partition_by_label(labels, num_parts, 1.0, generator())]
    for left, right in itertools.pairwise(parts):
        assert left.max() <= right.min()


@given(problems())
def test_partial_skew_sorts_that_fraction(problem):
    labels, num_parts, skew = problem
    parts = partition_by_label(labels, num_parts, skew, generator())
    num_sorted = round(skew * (len(labels) // num_parts))
    stretches = [labels[part[:num_sorted]] for part in parts]
    for left, right in itertools.pairwise(stretches):
        assert not num_sorted or left.max() <= right.min()


def test_histograms_lie_between_even_and_sorted():
    # 10 labels with 1000 samples each, 10 parts of 1000: expected 100 of each label, standard deviation about 9.5.
    labels = torch.arange(10).repeat_interleave(1000)

    def histograms(skew):
        parts = partition_by_label(labels, 10, skew, generator())
        return torch.stack([labels[part].bincount(minlength=10) for part in parts])

    assert (histograms(0.0) - 100).abs().max() < 5 * 9.5
    assert torch.equal(histograms(1.0), 1000 * torch.eye(10, dtype=torch.int64))
    # Half of each part is its own label, the other half even: 500 + 50 on the diagonal; the cuts of the sorted half
    # are off by the fluctuation of the label counts in it, standard deviation below sqrt(5000).
    diagonal = histograms(0.5).diagonal()
    assert (diagonal - 550).abs().max() < 250
    assert torch.equal(histograms(0.5).sum(dim=1), torch.full((10,), 1000))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.zeros(2, 2)}, r"Expected `labels` to be one-dimensional, got \(2, 2\)"),
        (
            {"num_parts": 0},
            "Expected `num_parts` to be between 1 and the number of samples, 4, got 0",
        ),
        ({"num_parts": 5}, "Expected `num_parts` .*, got 5. Ask for fewer parts"),
        ({"skew": 1.5}, r"Expected `skew` to be in \[0, 1\], got 1.5"),
        ({"skew": float("nan")}, r"Expected `skew` to be in \[0, 1\], got nan"),
    ],
)
def test_bad_arguments_are_named(change, message):
    arguments = {"labels": torch.zeros(4), "num_parts": 2, "skew": 0.5, **change}
    with pytest.raises(ValueError, match=message):
        partition_by_label(generator=generator(), **arguments)
