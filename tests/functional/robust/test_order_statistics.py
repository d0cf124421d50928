"""Sorting networks by the 0-1 principle, and order statistics against sorting."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from lightning_sgd.functional.robust.order_statistics import (
    column_median,
    mean_near_median,
    mean_near_trimmed_mean,
    network,
    odd_even_merge_sort,
    partially_sort,
    trimmed_mean,
)


def zeros_and_ones(n):
    return torch.tensor(list(itertools.product((0.0, 1.0), repeat=n))).T


@pytest.mark.parametrize("n", range(1, 13))
def test_what_sorts_all_zeros_and_ones_sorts_everything(n):
    bits = zeros_and_ones(n)
    before = bits.clone()
    found = torch.stack(partially_sort(bits, range(n)))
    assert torch.equal(found, bits.sort(dim=0).values)
    assert torch.equal(bits, before), "rows of the caller are not changed"


@pytest.mark.parametrize("n", range(1, 13))
def test_what_is_left_out_was_not_needed(n):
    bits = zeros_and_ones(n)
    ordered = bits.sort(dim=0).values
    for f in range((n - 1) // 2 + 1):
        groups = [None] * f + ["middle"] * (n - 2 * f) + [None] * f
        middle = torch.stack(partially_sort(bits, groups)[f : n - f])
        assert torch.equal(middle.sum(dim=0), ordered[f : n - f].sum(dim=0))
        rows = partially_sort(bits, [*range(f), *["middle"] * (n - 2 * f), *range(n - f, n)])
        for place in (*range(f), *range(n - f, n)):
            assert torch.equal(rows[place], ordered[place])


def test_sizes():
    # Knuth's table of Batcher's networks.
    sizes = [len(odd_even_merge_sort(n)) for n in (2, 4, 5, 8, 16, 20, 32)]
    assert sizes == [1, 5, 9, 19, 63, 97, 191]
    assert len(network((None,) * 9 + ("middle",) * 2 + (None,) * 9)) < 97


@pytest.mark.parametrize(("n", "f"), [(3, 1), (5, 1), (7, 2), (12, 3), (20, 4), (33, 8), (64, 16)])
def test_order_statistics_are_those_of_numpy(n, f):
    block = torch.randn(n, 300, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    x = block.numpy()
    np.testing.assert_array_equal(column_median(block), np.median(x, axis=0))
    trimmed = np.sort(x, axis=0)[f : n - f].mean(axis=0)
    np.testing.assert_allclose(trimmed_mean(block, f), trimmed, rtol=1e-12, atol=1e-14)
    for found, centre in (
        (mean_near_median, np.median(x, axis=0)),
        (mean_near_trimmed_mean, trimmed),
    ):
        nearest = np.argsort(np.abs(x - centre), axis=0)[: n - f]
        expected = np.take_along_axis(x, nearest, axis=0).mean(axis=0)
        np.testing.assert_allclose(found(block, f), expected, rtol=1e-12, atol=1e-14)


def test_more_may_be_far_than_near():
    # Bulyan leaves n − 4f of n − 2f.
    block = torch.randn(9, 300, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    nearest = np.argsort(np.abs(block.numpy() - np.median(block, axis=0)), axis=0)
    for num_near in range(1, 9):
        expected = np.take_along_axis(block.numpy(), nearest[:num_near], axis=0).mean(axis=0)
        np.testing.assert_allclose(mean_near_median(block, 9 - num_near), expected, rtol=1e-12)


def test_far_values_leave_no_rounding_behind():
    block = torch.tensor([[1.0], [1.25], [1.5], [1e8], [-1e8]])
    for found in (
        mean_near_median(block, 2),
        mean_near_trimmed_mean(block, 2),
        trimmed_mean(block, 1),
    ):
        assert float(found) == 1.25
