"""Many tensors in a few buffers: nothing is lost, mixed up, or rounded."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_sgd.functional.distributed.flat_buffers import (
    HEADER,
    FlatBuffers,
    accumulation_dtype,
)

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64)
SHAPES = st.lists(st.lists(st.integers(0, 4), max_size=3), min_size=1, max_size=6)


def tensors(shapes, dtypes):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(shape, generator=generator, dtype=torch.float32).to(dtype)
        for shape, dtype in zip(shapes, dtypes, strict=False)
    ]


@given(SHAPES, st.lists(st.sampled_from(DTYPES), min_size=6, max_size=6))
def test_what_is_packed_comes_back_bit_by_bit(shapes, dtypes):
    originals = tensors(shapes, dtypes)
    copies = [x.clone() for x in originals]
    flat = FlatBuffers(copies)
    flat.pack()
    for x in copies:
        x.zero_()
    flat.unpack()
    assert all(map(torch.equal, copies, originals))


@given(SHAPES, st.lists(st.sampled_from(DTYPES), min_size=6, max_size=6))
def test_buffers_are_as_long_as_needed(shapes, dtypes):
    copies = tensors(shapes, dtypes)
    flat = FlatBuffers(copies)
    num = sum(math.prod(x.shape) * (2 if x.is_complex() else 1) for x in copies)
    assert sum(len(buffer) - HEADER for buffer in flat.buffers) == num
    assert flat.num_bytes == sum(buffer.nbytes for buffer in flat.buffers)
    assert len(flat.buffers) == len({accumulation_dtype(torch.empty(0, dtype=d).real.dtype)
                                     for d in (x.dtype for x in copies)})  # fmt: skip


def test_tensors_keep_their_storage_and_strides():
    # Views of a buffer instead would undo channels_last, and share_memory_().
    image = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    pointer, strides, values = image.data_ptr(), image.stride(), image.clone()
    flat = FlatBuffers([image, torch.randn(5, 3).T])
    flat.pack()
    flat.unpack()
    assert (image.data_ptr(), image.stride()) == (pointer, strides)
    assert torch.equal(image, values)
    assert all(image.data_ptr() != buffer.data_ptr() for buffer in flat.buffers)


def test_tied_weights_have_one_place():
    weight = torch.randn(3)
    flat = FlatBuffers([weight, torch.randn(2), weight])
    assert len(flat.buffers[0]) == HEADER + 5
    assert flat.holds([weight, flat.tensors[1]])
    assert not flat.holds([weight.clone(), flat.tensors[1]])


def test_parameters_can_be_packed():
    layer = torch.nn.Linear(2, 2)
    flat = FlatBuffers(list(layer.parameters()))
    flat.pack()
    flat.buffers[0].mul_(2)
    before = layer.weight.detach().clone()
    flat.unpack()
    assert torch.equal(layer.weight, 2 * before)
    assert layer.weight.requires_grad


def test_other_tensors_of_the_same_shapes_can_be_packed():
    weight, source = torch.zeros(2), torch.tensor([1.0, 2.0], dtype=torch.float64)
    flat = FlatBuffers([weight])
    flat.pack([source])
    flat.unpack()
    assert torch.equal(weight, source.float())


@pytest.mark.parametrize("num", [3, 7, 11, 49, 100])
def test_the_mean_of_equal_numbers_is_that_number_where_it_must_be(num):
    torch.manual_seed(0)
    constants = torch.randn(10000)
    flat = FlatBuffers([constants], exact=True)
    flat.pack()
    total = sum(flat.buffers[0].clone() for _ in range(num))
    flat.buffers[0].copy_(total / num)
    before = constants.clone()
    flat.unpack()
    assert torch.equal(constants, before)


def test_nothing_to_pack_is_nothing_to_send():
    flat = FlatBuffers([])
    flat.pack()
    flat.unpack()
    assert flat.buffers == []
    assert flat.num_bytes == 0
