"""Subsets of smallest diameter and covariance, against looking at all of them."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
import torch

from lightning_sgd.functional.robust.stacked_rows import squared_distances
from lightning_sgd.functional.robust.subsets import (
    smallest_covariance_subset,
    smallest_diameter_subset,
)


def distances_of(rows):
    return np.square(rows[:, None] - rows[None]).sum(axis=-1)


@pytest.mark.parametrize(
    ("n", "f"), [(2, 0), (3, 1), (6, 2), (8, 3), (9, 4), (10, 3), (12, 4), (14, 5)]
)
@pytest.mark.parametrize("kind", ["noise", "line", "ties", "clusters"])
def test_no_subset_has_a_smaller_diameter(n, f, kind):
    rng = np.random.default_rng(n)
    for _ in range(6):
        rows = {
            "noise": rng.normal(size=(n, 5)),
            "line": rng.normal(size=(n, 1)),
            "ties": rng.integers(0, 3, size=(n, 2)).astype(float),
            "clusters": rng.normal(size=(n, 2)) + 5 * rng.integers(0, 3, size=(n, 1)),
        }[kind]
        distances = distances_of(rows)
        found = smallest_diameter_subset(torch.from_numpy(distances), n - f)
        assert len(set(found)) == n - f
        smallest = min(
            distances[np.ix_(s, s)].max() for s in itertools.combinations(range(n), n - f)
        )
        assert distances[np.ix_(found, found)].max() == smallest


@pytest.mark.parametrize("kind", ["noise", "attacked", "clusters"])
def test_many_workers_take_no_time(kind):
    # 64 workers of which 16 may be faulty have 4.9e14 subsets.
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(64, 200))
    if kind == "attacked":
        rows[:16] += 2
    if kind == "clusters":
        rows[:32] += 2
    start = time.process_time()
    found = smallest_diameter_subset(torch.from_numpy(distances_of(rows)), 48)
    assert time.process_time() - start < 20
    assert len(found) == 48
    if kind == "attacked":
        assert min(found) == 16


@pytest.mark.parametrize(
    ("n", "f", "d"), [(3, 1, 1), (6, 2, 3), (9, 3, 20), (11, 4, 2), (12, 6, 5)]
)
def test_no_subset_has_a_smaller_spread(n, f, d):
    rng = np.random.default_rng(n)
    for scale in (1, 30):
        rows = rng.normal(size=(n, d)) + 100
        rows[:f] *= scale
        found = smallest_covariance_subset(torch.from_numpy(rows @ rows.T), n - f)
        spreads = {
            s: np.linalg.norm(rows[list(s)] - rows[list(s)].mean(axis=0), 2)
            for s in itertools.combinations(range(n), n - f)
        }
        assert spreads[tuple(found)] == pytest.approx(min(spreads.values()), rel=1e-6)


def test_distances_of_equal_rows_are_zero():
    rows = torch.tensor([[3.0, 4.0], [3.0, 4.0], [0.0, 0.0]], dtype=torch.float64)
    expected = [[0.0, 0.0, 25.0], [0.0, 0.0, 25.0], [25.0, 25.0, 0.0]]
    assert squared_distances(rows @ rows.T).tolist() == expected
