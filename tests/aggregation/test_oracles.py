"""Rules against their definitions on whole vectors, in double precision."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support import aggregation_oracles as oracles

from lightning_sgd.aggregation import composition, get_aggregator

SIZES = [(3, 1, 2), (5, 1, 3), (7, 1, 40), (9, 2, 5), (11, 2, 300), (12, 2, 1)]


def is_defined(name, n, f, d):
    """Whether the rule promises anything, and the result does not hang on the order of equal numbers."""
    if "bulyan" in name and n < 4 * f + 3:
        return False
    if "krum" in name and n < 2 * f + 3:
        return False
    if name == "geomed":
        return d > 1  # on a line all between the two in the middle are medians
    return "+" not in name or n > 3  # mixed rows of three are equal


def cases():
    return [
        pytest.param(name, n, f, d, id=f"{name}-{n}-{f}-{d}")
        for name in oracles.RULES
        for n, f, d in SIZES
        if is_defined(name, n, f, d)
    ]


def rows_with_outliers(n, f, d, seed):
    """Rows with a large common part, and outliers of another kind each."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(n, d, generator=generator, dtype=torch.float64) + 3
    rows[n - f :] *= 4 * torch.rand(f, 1, generator=generator, dtype=torch.float64) - 2
    return rows[torch.randperm(n, generator=generator)]


def test_every_rule_has_an_oracle():
    assert set(composition.RULES) <= set(oracles.RULES)


@pytest.mark.parametrize(("name", "n", "f", "d"), cases())
def test_double_precision(name, n, f, d):
    for seed in range(4):
        rows = rows_with_outliers(n, f, d, seed)
        rule = get_aggregator(name, f)
        found, expected = rule(rows).numpy(), oracles.RULES[name](rows.numpy(), f)
        if name == "mda":  # several subsets may have the smallest diameter
            subset = rows[rule.report.weights > 0].numpy()
            assert len(subset) == n - f
            smallest = min(oracles.squares(s).max() for s in oracles.subsets(rows.numpy(), f))
            assert oracles.squares(subset).max() == pytest.approx(smallest, rel=1e-12)
            expected = subset.mean(axis=0)
        tolerance = 1e-6 if name in {"geomed", "nnm+cclip"} else 1e-9  # roots of small differences
        np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", sorted(oracles.RULES))
def test_single_precision(name):
    rows = rows_with_outliers(11, 2, 500, seed=1).float()
    expected = oracles.RULES[name](rows.double().numpy(), 2)
    np.testing.assert_allclose(get_aggregator(name, 2)(rows), expected, rtol=1e-6, atol=3e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", sorted(oracles.RULES))
def test_half_precision_is_computed_in_single_and_rounded_once(name, dtype):
    rows = rows_with_outliers(11, 2, 500, seed=1).to(dtype)
    expected = get_aggregator(name, 2)(rows.float())
    assert torch.equal(get_aggregator(name, 2)(rows), expected.to(dtype))


@pytest.mark.parametrize("name", ["krum", "filter", "geomed", "mda", "nnm+krum"])
def test_a_large_common_part_costs_no_precision(name):
    # In float32 the inner products of the rows themselves would hold no digit of the distances.
    rows = rows_with_outliers(11, 2, 1000, seed=0).float() + 1000
    expected = oracles.RULES[name](rows.double().numpy(), 2)
    np.testing.assert_allclose(get_aggregator(name, 2)(rows).double(), expected, atol=2e-4)


@pytest.mark.parametrize("name", sorted(oracles.RULES))
def test_blocks_and_vectors_are_one_matrix(name, monkeypatch):
    rows = rows_with_outliers(11, 2, 1001, seed=2)
    whole = get_aggregator(name, 2)(rows)
    from lightning_sgd.aggregation import _aggregator
    from lightning_sgd.functional.robust import stacked_rows

    monkeypatch.setattr(_aggregator, "BLOCK", 64)
    monkeypatch.setattr(stacked_rows.column_blocks, "__defaults__", (100,))
    torch.testing.assert_close(get_aggregator(name, 2)(rows), whole, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(get_aggregator(name, 2)(list(rows)), whole, rtol=1e-9, atol=1e-9)
