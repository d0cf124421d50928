"""Collectives of callbacks on real processes, against plain torch on the inputs of all ranks."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from support.processes import run_ranks

from lightning_sgd._distributed import (
    gather,
    gather_numbers,
    gather_texts,
    reduce_max,
    reduce_mean,
    reduce_sum,
)

pytestmark = [
    pytest.mark.timeout(60),
    pytest.mark.parametrize("num_ranks", [1, 2, 3]),
]


def inputs(rank):
    """Not contiguous, and another matrix on every rank."""
    return torch.randn(5, 3, generator=torch.Generator().manual_seed(rank)).T


def stacked(num_ranks):
    return torch.stack([inputs(rank) for rank in range(num_ranks)])


def on_cpu(num_ranks):
    """What the functions ask a Trainer for."""
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    return SimpleNamespace(world_size=num_ranks, strategy=strategy)


def test_tensors_are_stacked_in_the_order_of_the_ranks(num_ranks, tmp_path):
    found = run_ranks(lambda rank: gather(inputs(rank), num_ranks), num_ranks, tmp_path)
    assert len(found) == num_ranks
    assert all(torch.equal(each, stacked(num_ranks)) for each in found)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float64])
def test_every_type_of_number_is_gathered(num_ranks, tmp_path, dtype):
    def work(rank):
        return gather(torch.tensor([rank % 2, 1], dtype=dtype), num_ranks)

    expected = torch.tensor([[rank % 2, 1] for rank in range(num_ranks)], dtype=dtype)
    assert all(torch.equal(each, expected) for each in run_ranks(work, num_ranks, tmp_path))


def test_numbers_keep_all_digits(num_ranks, tmp_path):
    # 2^53 and a third are exact in float64 alone.
    def work(rank):
        return gather_numbers(on_cpu(num_ranks), [2.0**53 - rank, 1 / 3, float("inf")])

    expected = [[2.0**53 - rank, 1 / 3, float("inf")] for rank in range(num_ranks)]
    assert run_ranks(work, num_ranks, tmp_path) == [expected] * num_ranks


@pytest.mark.parametrize(
    "texts",
    [
        ["host-0", "a much longer name.of.a.host", ""],
        ["", "", ""],
        ["größe", "节点", "🙂"],
        ["line\nline", " spaces ", "'quotes'"],
    ],
    ids=["unequal lengths", "empty", "non-ASCII", "special characters"],
)
def test_texts_arrive_as_they_were(num_ranks, tmp_path, texts):
    found = run_ranks(
        lambda rank: gather_texts(on_cpu(num_ranks), texts[rank]), num_ranks, tmp_path
    )
    assert found == [texts[:num_ranks]] * num_ranks


def test_the_largest_is_taken_of_each_number(num_ranks, tmp_path):
    def work(rank):
        return reduce_max(on_cpu(num_ranks), [float(rank), -float(rank), 2.0**53 - rank])

    expected = [float(num_ranks - 1), 0.0, 2.0**53]
    assert [list(map(abs, each)) for each in run_ranks(work, num_ranks, tmp_path)] == [
        expected
    ] * num_ranks


@pytest.mark.parametrize(
    ("reduce", "by_torch"), [(reduce_sum, torch.sum), (reduce_mean, torch.mean)]
)
def test_tensors_are_reduced_in_place(num_ranks, tmp_path, reduce, by_torch):
    def work(rank):
        tensor = inputs(rank).contiguous()
        result = reduce(tensor, num_ranks)
        assert result.data_ptr() == tensor.data_ptr()
        return result

    found = run_ranks(work, num_ranks, tmp_path)
    for each in found:
        torch.testing.assert_close(each, by_torch(stacked(num_ranks), dim=0))
        assert torch.equal(each, found[0]), "bit by bit the same on all ranks"
