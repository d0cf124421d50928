"""Gradients as rows: nothing is lost, mixed up or rounded, whatever the number of parts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_sgd.functional.distributed.flat_gradients import FlatGradients

SHAPES = st.lists(st.lists(st.integers(0, 4), max_size=3), min_size=1, max_size=5)
DTYPES = st.lists(
    st.sampled_from((torch.float32, torch.bfloat16, torch.complex64)), min_size=5, max_size=5
)


def parameters(shapes, dtypes):
    generator = torch.Generator().manual_seed(0)
    made = []
    for shape, dtype in zip(shapes, dtypes, strict=False):
        made.append(torch.zeros(shape, dtype=dtype, requires_grad=True))
        made[-1].grad = torch.randn(shape, generator=generator).to(dtype)
    return made


@given(SHAPES, DTYPES, st.integers(1, 7))
def test_gradients_come_back_bit_by_bit(shapes, dtypes, num_shards):
    params = parameters(shapes, dtypes)
    before = [param.grad.clone() for param in params]
    gradients = FlatGradients(params, num_shards)
    gradients.pack()
    for param in params:
        param.grad = None
    gradients.unpack(gradients.rows[0], gradients.used)
    assert all(torch.equal(p.grad, old) for p, old in zip(params, before, strict=True))
    assert all(p.grad.dtype == p.dtype for p in params)


@given(SHAPES, DTYPES, st.integers(1, 7))
def test_parts_are_equal_and_what_is_added_is_zero(shapes, dtypes, num_shards):
    params = parameters(shapes, dtypes)
    gradients = FlatGradients(params, num_shards)
    gradients.pack()
    d = sum(p.numel() * (2 if p.is_complex() else 1) for p in params)
    assert gradients.numel == d
    assert gradients.num_bytes == 4 * d
    assert gradients.rows.shape == (1, num_shards * gradients.shard_size)
    assert d <= gradients.rows.shape[1] < d + num_shards
    assert not gradients.rows[0, d:].any()


def test_missing_gradients_are_zeros_and_stay_missing_where_nobody_has_them():
    # An optimizer would apply weight decay to a frozen layer that gets a gradient of zeros.
    params = [torch.ones(2, requires_grad=True), torch.ones(3, requires_grad=True)]
    params[0].grad = torch.tensor([1.0, 2.0])
    gradients = FlatGradients(params, num_shards=2)
    gradients.rows.fill_(7.0)
    gradients.pack(factor=2.0)
    assert gradients.rows[0, :5].tolist() == [2.0, 4.0, 0.0, 0.0, 0.0]
    assert gradients.used == [True, False]
    gradients.unpack(gradients.rows[0], gradients.used, factor=0.5)
    assert params[0].grad.tolist() == [1.0, 2.0]
    assert params[1].grad is None


def test_rows_of_micro_batches_stack_up_and_absent_ones_are_nan():
    param = torch.zeros(3, requires_grad=True)
    gradients = FlatGradients([param], num_shards=2)
    for value in (1.0, 2.0):
        param.grad = torch.full((3,), value)
        gradients.pack()
    gradients.pack(absent=True)
    assert gradients.num_packed == 3
    assert gradients.rows[:2, :3].tolist() == [[1.0] * 3, [2.0] * 3]
    assert gradients.rows[2, :3].isnan().all()
    assert gradients.rows[2, 3] == 0.0  # beyond the end nothing may spoil norms of others
    gradients.clear()
    assert (gradients.num_packed, gradients.used) == (0, [False])


def test_tied_weights_have_one_place():
    param = torch.zeros(3, requires_grad=True)
    assert FlatGradients([param, param], num_shards=1).numel == 3


def test_sparse_gradients_are_refused_with_the_setting_to_change():
    table = torch.nn.Embedding(4, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="Set sparse=False in the embedding"):
        FlatGradients([table.weight], 1).pack()
