"""Norms, Gram matrices and combinations of stacked rows, in every precision and in shards."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lightning_sgd.functional.robust.stacked_rows import (
    check_rows,
    column_blocks,
    combine,
    row_gram,
    squared_distances,
    squared_row_norms,
    usable_rows,
)


def normal(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("width", [1, 7, 100_003])
def test_inner_products_are_those_of_numpy(dtype, width):
    rows = normal(5, width, dtype=dtype)
    x = rows.double().numpy()
    np.testing.assert_allclose(row_gram(rows, None), x @ x.T, rtol=1e-5, atol=1e-5 * width**0.5)
    np.testing.assert_allclose(squared_row_norms(rows), np.square(x).sum(axis=1), rtol=1e-5)
    shifted = x - x[2]
    found = row_gram(list(rows), 2)
    np.testing.assert_allclose(found, shifted @ shifted.T, rtol=1e-5, atol=1e-5 * width**0.5)
    assert torch.equal(found, found.mT)


def test_a_common_part_leaves_the_distances_their_digits():
    # 0.67 relative error without the shift.
    rows = 1000 + normal(8, 100_000)
    x = rows.double()
    exact = squared_distances((x - x[0]) @ (x - x[0]).mT)
    errors = (squared_distances(row_gram(rows, 0)) - exact).abs() / exact.clamp_min(1.0)
    assert float(errors.max()) < 2e-6
    plain = squared_distances((rows @ rows.mT).double())
    assert float(((plain - exact).abs() / exact.clamp_min(1.0)).max()) > 1e-2


def test_shards_add_up():
    rows = normal(6, 1001)
    shards = [rows[:, :400], rows[:, 400:403], rows[:, 403:]]
    norms = sum(squared_row_norms(shard) for shard in shards)
    torch.testing.assert_close(norms, squared_row_norms(rows), rtol=1e-6, atol=0)
    grams = sum(row_gram(shard, 3) for shard in shards)
    torch.testing.assert_close(grams, row_gram(rows, 3), rtol=1e-5, atol=1e-4)


def test_norms_beyond_single_precision():
    rows = torch.tensor(
        [[1e30, 1e30], [1e-30, 0.0], [3e38, 3e38], [torch.inf, 0.0], [torch.nan, 1.0]]
    )
    found = squared_row_norms(rows).sqrt()
    assert found[:3].tolist() == pytest.approx([2**0.5 * 1e30, 1e-30, 2**0.5 * 3e38], rel=1e-6)
    assert found[3] == torch.inf
    assert found[4].isnan()


@pytest.mark.parametrize(
    ("norms", "f", "kept"),
    [
        ([1, 1, 1, 1], 1, [0, 1, 2, 3]),
        ([1, torch.nan, torch.inf, 1], 2, [0, 3]),
        ([1, torch.nan, torch.inf, 1], 0, [0, 3]),
        ([1, 2, 1, 1e5], 1, [0, 1, 2]),
        ([1, 2, 1, 1e5], 0, [0, 1, 2, 3]),  # finite rows are not dropped beyond f
        ([1, 2, 1e6, 1, 1e5], 1, [0, 1, 3, 4]),  # the longest first
        ([1, 2, torch.nan, 1, 1e5], 1, [0, 1, 3, 4]),
        ([1, 2, 9e3, 1, 1], 1, [0, 1, 2, 3, 4]),
        ([0, 0, 0, 5, 1e30], 2, [0, 1, 2, 3]),  # most rows are zero
        ([torch.nan, torch.nan], 1, []),
    ],
)
def test_which_rows_can_be_computed_with(norms, f, kept):
    assert usable_rows(torch.tensor(norms, dtype=torch.float64).square(), f) == kept


def test_rows_without_weight_are_not_touched():
    block = normal(4, 10)
    block[2] = torch.nan
    matrix = torch.tensor([[0.5, 0.5, 0.0, 0.0], [0.0, 0.25, 0.0, 0.75]], dtype=torch.float64)
    found = combine(matrix, block)
    expected = torch.stack([(block[0] + block[1]) / 2, block[1] / 4 + 0.75 * block[3]])
    torch.testing.assert_close(found, expected)


def test_blocks_cover_all_columns_in_at_least_single_precision():
    for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        rows = normal(3, 10, dtype=dtype)
        blocks = list(column_blocks(rows, 4))
        assert torch.equal(torch.cat([block for _, block in blocks], dim=1), rows.to(expected))
        assert [(c.start, block.shape[1]) for c, block in blocks] == [(0, 4), (4, 4), (8, 2)]


@pytest.mark.parametrize(
    "rows",
    [
        torch.ones(3),
        torch.ones(2, 2, 2),
        torch.ones(3, 0),
        [],
        [torch.ones(2), torch.ones(3)],
        [torch.ones(2, 2)],
        torch.ones(2, 2, dtype=torch.int64),
        torch.ones(2, 2, dtype=torch.complex64),
    ],
)
def test_what_are_no_rows(rows):
    with pytest.raises(ValueError, match=r"Expected `rows` to be .* one flat gradient per worker"):
        check_rows(rows)


def test_training_under_autocast_changes_nothing():
    rows = normal(5, 1000)
    expected = row_gram(rows, 0), combine(torch.eye(5, dtype=torch.float64), rows)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(row_gram(rows, 0), expected[0])
        assert torch.equal(combine(torch.eye(5, dtype=torch.float64), rows), expected[1])
