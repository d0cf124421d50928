"""Exchanges between real processes: the mean, the same bits everywhere, and ranks that are not at the same place."""

from __future__ import annotations

import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from support.processes import run_ranks

from lightning_sgd.functional.distributed.flat_buffers import FlatBuffers
from lightning_sgd.strategies._base.common_model import MeanModel
from lightning_sgd.strategies._comm.collectives import (
    NUM_TAGS,
    Collectives,
    Purpose,
    _is_stamped_alike,
    _stamp,
)
from lightning_sgd.strategies._comm.failures import (
    LOST,
    ExchangeError,
    diagnose,
    is_failed_exchange,
)

pytestmark = pytest.mark.timeout(60)


def exchange():
    return Collectives(timedelta(seconds=20))


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_all_ranks_get_the_same_bits_of_the_mean(tmp_path, num_ranks, dtype):
    def values(rank):
        return torch.randn(1000, generator=torch.Generator().manual_seed(rank)).to(dtype)

    def work(rank):
        mine = values(rank)
        flat = FlatBuffers([mine])
        flat.pack()
        exchange().all_reduce_mean(flat, Purpose.ROUND, 5)
        flat.unpack()
        return mine

    results = run_ranks(work, num_ranks, tmp_path)
    mean = torch.stack([values(rank).double() for rank in range(num_ranks)]).mean(dim=0)
    assert all(torch.equal(result, results[0]) for result in results)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(results[0].double(), mean, rtol=2 * eps, atol=2 * eps)


def test_rank_0_gives_to_all(tmp_path):
    def work(rank):
        mine = torch.full((3,), float(rank + 7))
        flat = FlatBuffers([mine])
        flat.pack()
        exchange().broadcast(flat, Purpose.ROUND, 0)
        flat.unpack()
        return mine

    assert all(torch.equal(r, torch.full((3,), 7.0)) for r in run_ranks(work, 3, tmp_path))


@pytest.mark.parametrize(
    ("purposes", "steps", "expected"),
    [
        ((Purpose.ROUND, Purpose.CONSENSUS), (6, 6), "rank 0: round after step 6; rank 1: consensus"),
        ((Purpose.ROUND, Purpose.ROUND), (6, 7), "rank 0: round after step 6; rank 1: round after step 7"),
    ],
)  # fmt: skip
def test_ranks_at_different_places_are_told_where_each_is(tmp_path, purposes, steps, expected):
    def work(rank):
        flat = FlatBuffers([torch.randn(3)])
        flat.pack()
        try:
            exchange().all_reduce_mean(flat, purposes[rank], steps[rank])
        except ExchangeError as error:
            return str(error)
        return ""

    for message in run_ranks(work, 2, tmp_path):
        assert expected in message


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [2, 5, 64, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tags_are_equal_exactly_when_their_sums_say_so(num_ranks, dtype):
    def total(tags):
        buffer = torch.zeros(3, dtype=dtype)
        for tag in tags:
            stamped = torch.zeros(3, dtype=dtype)
            _stamp(stamped, tag)
            buffer += stamped
        return buffer

    for tag in range(NUM_TAGS):
        assert _is_stamped_alike(total([tag] * num_ranks), num_ranks)
        other = (tag + 1) % NUM_TAGS
        assert not _is_stamped_alike(total([other] + [tag] * (num_ranks - 1)), num_ranks)


def test_ranks_agree_or_not(tmp_path):
    def work(rank):
        ours = exchange()
        return ours.all_equal(5, 0), ours.all_equal(rank, 0)

    assert run_ranks(work, 2, tmp_path) == [(True, False)] * 2


def test_things_are_gathered(tmp_path):
    def work(rank):
        ours = exchange()
        thing = {"rank": rank, "tensor": torch.tensor([rank])}
        return ours.gather_object(thing, 0), ours.all_gather_object(rank)

    (first, everywhere), (second, _) = run_ranks(work, 2, tmp_path)
    assert [thing["rank"] for thing in first] == everywhere == [0, 1]
    assert second is None


def test_waiting_is_measured(tmp_path):
    def work(rank):
        ours = exchange()
        time.sleep(0.5 * rank)
        flat = FlatBuffers([torch.randn(3)])
        ours.all_reduce_mean(flat, Purpose.ROUND, 0)
        return ours.traffic.seconds

    waited, _ = run_ranks(work, 2, tmp_path)
    assert waited > 0.3


WAYS = {
    "round": lambda ours: ours.all_reduce_mean(FlatBuffers([torch.randn(3)]), Purpose.ROUND, 7),
    "state, agreed": lambda ours: ours.all_equal(1, 7),
    "state, gathered": lambda ours: ours.gather_object({}, 7),
}


@pytest.mark.parametrize("way", WAYS)
def test_the_rank_that_waits_gives_up_in_time_and_names_place_and_rank(tmp_path, way):
    def work(rank):
        ours = Collectives(timedelta(seconds=1))
        if rank == 1:
            time.sleep(5)
            return "", 0.0
        begin = time.monotonic()
        try:
            WAYS[way](ours)
        except ExchangeError as error:
            took = time.monotonic() - begin
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
            return str(error), took
        return "", 0.0

    message, seconds = run_ranks(work, 2, tmp_path)[0]
    place = way.split(",")[0]
    assert f"Rank 0 could not finish the exchange of {place} after step 7." in message
    assert "Rank 1 does not answer: killed, stopped, or out of reach." in message
    assert seconds < 1 + 2 + 1  # the timeout, the roll call, and some


def test_who_is_to_blame():
    place = f"{LOST}round after step 3"
    assert diagnose({0: place, 1: place}).startswith("Every rank still answers")
    assert (
        diagnose({0: place, 1: None}) == "Rank 1 does not answer: killed, stopped, or out of reach."
    )
    failed = {0: place, 1: "raised KeyError: 'x'", 2: None}
    assert diagnose(failed) == "Rank 1 raised KeyError: 'x'."
    elsewhere = {0: place, 1: f"{LOST}consensus after step 2"}
    assert "rank 0: round after step 3; rank 1: consensus after step 2" in diagnose(elsewhere)


def test_only_failures_of_exchanges_count_as_such():
    assert is_failed_exchange(RuntimeError("Connection closed by peer [127.0.0.1]:1"))
    assert is_failed_exchange(RuntimeError("[gloo/unbound_buffer.cc] Timed out waiting 20ms"))
    assert not is_failed_exchange(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_failed_exchange(ValueError("gloo"))


@pytest.mark.parametrize("fails", [False, True])
def test_own_weights_come_back_bit_by_bit_also_after_a_failure(tmp_path, fails):
    def work(rank):
        generator = torch.Generator().manual_seed(rank)
        weights = torch.randn(101, generator=generator)
        statistics = torch.randn(7, generator=generator)
        before = weights.clone(), statistics.clone()
        optimizer = torch.optim.SGD([weights], lr=0.1)
        ours = MeanModel(
            exchange(), [optimizer], [], [statistics], lambda _: None, "average", "keep"
        )
        ours.replicas[0].step()
        try:
            with ours.swapped_in():
                seen = weights.clone(), statistics.clone()
                with ours.own():
                    assert torch.equal(weights, before[0])
                assert torch.equal(weights, seen[0])
                if fails:
                    raise RuntimeError
        except RuntimeError:
            pass
        back = torch.equal(weights, before[0]) and torch.equal(statistics, before[1])
        return seen, back, before

    (first, back, own), (second, also_back, other) = run_ranks(work, 2, tmp_path)
    assert back
    assert also_back
    for mean, same, *both in zip(first, second, own, other, strict=True):
        assert torch.equal(mean, same)
        torch.testing.assert_close(mean, (both[0] + both[1]) / 2)


def test_buffers_that_never_change_keep_every_bit(tmp_path):
    # Seven is the smallest number of ranks for which the mean of equal float32 numbers is not always that number.
    def work(rank):
        torch.manual_seed(0)
        constants, weights = torch.rand(10000), torch.randn(3)
        before = constants.clone()
        optimizer = torch.optim.SGD([weights], lr=0.1)
        ours = MeanModel(
            exchange(), [optimizer], [], [constants], lambda _: None, "average", "keep"
        )
        ours.average(ours.replicas[0])
        return bool(torch.equal(constants, before))

    assert run_ranks(work, 7, tmp_path) == [True] * 7
