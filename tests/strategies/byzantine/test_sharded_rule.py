"""Rules over real processes that hold a part of the columns each give what one process gives."""

from __future__ import annotations

import copy
import math
from contextlib import suppress

import pytest
import torch
from support.byzantine_training import exchange, replica, row
from support.processes import run_ranks

from lightning_sgd.aggregation import Mean, get_aggregator
from lightning_sgd.functional.distributed.traffic import all_reduce_traffic
from lightning_sgd.strategies._comm.all_to_all import DIRECT_BYTES
from lightning_sgd.strategies._comm.collectives import Purpose
from lightning_sgd.strategies._comm.failures import ExchangeError
from lightning_sgd.strategies.byzantine.sharded_rule import (
    NoResult,
    ShardedRule,
    squared_distances_from,
)

pytestmark = pytest.mark.timeout(60)


COORDINATE = ("mean", "median", "trmean", "meamed", "phocas")


GRAM = ("filter", "caf", "krum", "multikrum", "geomed", "mda", "faba", "cge", "cclip", "nnm+krum")


BOTH = ("nnm+trmean", "bucketing+median", "clip(radius=3.0)+median", "arc+trmean")


def combine(ours, sharded, gradient):
    """What this rank gets from one step."""
    mine = replica(gradient, ours.num_ranks)
    columns, words = mine.scatter(ours, mine.gradients.rows)
    previous = sharded.part_of_previous(mine.gradients, ours.rank)
    plan = sharded.decide(columns, [absent for _, absent in words], previous, ours, 0)
    assert not isinstance(plan, NoResult), plan
    result = mine.gather(ours, sharded.carry_out(plan, columns, previous))
    sharded.remember(result)
    return result[: len(gradient)]


def rules(num_ranks):
    """Those that accept so few workers, by name."""
    for name in (*COORDINATE, *GRAM, *BOTH):
        rule = get_aggregator(name, (num_ranks - 1) // 4)
        is_unique = (
            num_ranks > 2 or name != "geomed"
        )  # every point between two is a median of theirs
        with suppress(ValueError):
            rule.check(num_ranks)
            if is_unique:
                yield name, rule


@pytest.mark.parametrize("num_ranks", [2, 3, 5])
def test_what_ranks_compute_together_is_what_one_computes_alone(tmp_path, num_ranks):
    lengths = 1, num_ranks - 1, num_ranks, 10, 1003

    def work(rank):
        ours = exchange()
        return {
            (name, d): combine(ours, ShardedRule(copy.deepcopy(rule)), row(rank, d))
            for name, rule in rules(num_ranks)
            for d in lengths
        }

    results = run_ranks(work, num_ranks, tmp_path)
    tried = dict(rules(num_ranks))
    assert len(tried) > 8
    for name, rule in tried.items():
        for d in lengths:
            rows = torch.stack([row(rank, d) for rank in range(num_ranks)])
            expected = copy.deepcopy(rule)(rows)
            got = [result[name, d] for result in results]
            assert all(torch.equal(each, got[0]) for each in got), (name, d)
            if name in COORDINATE:
                assert torch.equal(got[0], expected), (name, d)
            else:
                torch.testing.assert_close(
                    got[0], expected, rtol=1e-6, atol=1e-6, msg=f"{name} {d}"
                )


def test_rules_that_go_on_from_their_last_result(tmp_path):
    steps, d = 4, 11

    def work(rank):
        ours, sharded = exchange(), ShardedRule(get_aggregator("cclip", 1))
        return [combine(ours, sharded, row(10 * step + rank, d)) for step in range(steps)]

    results = run_ranks(work, 4, tmp_path)
    rule = get_aggregator("cclip", 1)
    for step in range(steps):
        rows = torch.stack([row(10 * step + rank, d) for rank in range(4)])
        torch.testing.assert_close(results[0][step], rule(rows), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("broken", [math.nan, math.inf, 1e38])
@pytest.mark.parametrize("name", ["filter", "median", "krum", "cge", "nnm+trmean"])
def test_a_row_that_nobody_can_compute_with_is_left_out(tmp_path, name, broken):
    # It is broken in one part of the columns only, so that one rank alone sees that.
    n, d = 5, 23

    def gradient(rank):
        values = row(rank, d)
        if rank == 1:
            values[3] = broken
        return values

    def work(rank):
        sharded = ShardedRule(get_aggregator(name, 1))
        result = combine(exchange(), sharded, gradient(rank))
        return result, list(sharded.report.dropped)

    results = run_ranks(work, n, tmp_path)
    expected = get_aggregator(name, 1)(torch.stack([gradient(rank) for rank in range(n)]))
    for result, dropped in results:
        assert torch.equal(result, results[0][0])
        assert dropped == [1]
        torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-6)


def test_rules_in_double_precision(tmp_path):
    def work(rank):
        sharded = ShardedRule(get_aggregator("filter", 1))
        return combine(exchange(), sharded, row(rank, 101, torch.float64))

    results = run_ranks(work, 3, tmp_path)
    rows = torch.stack([row(rank, 101, torch.float64) for rank in range(3)])
    assert results[0].dtype == torch.float64
    torch.testing.assert_close(
        results[0], get_aggregator("filter", 1)(rows), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("name", ["filter", "trmean"])
def test_as_many_bytes_as_a_ring_all_reduce(tmp_path, name, num_ranks):
    d = 100_003

    def work(rank):
        ours = exchange()
        combine(ours, ShardedRule(get_aggregator(name, 0)), row(rank, d))
        return ours.traffic.num_bytes

    ring, _ = all_reduce_traffic(4 * d, num_ranks)
    for num_bytes in run_ranks(work, num_ranks, tmp_path):
        shard = -(-d // num_ranks)
        small = num_ranks * (num_ranks + 1) if name == "filter" else num_ranks
        letters = 5 * 8
        by_hand = (num_ranks - 1) * (2 * 4 * shard + 8 * small + letters)
        assert num_bytes == by_hand
        assert num_bytes <= 1.02 * ring


def test_distances_add_up_over_the_parts():
    rows, point = torch.randn(4, 9), torch.randn(9)
    parts = [squared_distances_from(rows[:, i : i + 3], point[i : i + 3]) for i in (0, 3, 6)]
    torch.testing.assert_close(
        sum(parts), (rows - point).double().square().sum(dim=1), rtol=1e-6, atol=1e-6
    )


def test_sums_are_the_same_bits_on_all_ranks_whichever_way_they_go(tmp_path):
    lengths = 3, DIRECT_BYTES  # many go round in a ring

    def work(rank):
        generator = torch.Generator().manual_seed(rank)
        ours = exchange()
        return [
            ours.all_reduce_sum(
                torch.randn(d, generator=generator, dtype=torch.float64), Purpose.STATE, 0
            )
            for d in lengths
        ]

    results = run_ranks(work, 3, tmp_path)
    generators = [torch.Generator().manual_seed(rank) for rank in range(3)]
    for index, d in enumerate(lengths):
        expected = sum(torch.randn(d, generator=g, dtype=torch.float64) for g in generators)
        torch.testing.assert_close(results[0][index], expected)
        assert all(torch.equal(result[index], results[0][index]) for result in results)


@pytest.mark.parametrize(
    ("purposes", "layouts", "expected"),
    [
        ((Purpose.GRADIENTS, Purpose.WEIGHTS), (1, 1), "rank 0: gradients after step 3; rank 1: weights"),
        ((Purpose.GRADIENTS, Purpose.GRADIENTS), (1, 2), "has other parameters, in number, shape or order"),
    ],
)  # fmt: skip
def test_ranks_that_trade_different_things_are_told(tmp_path, purposes, layouts, expected):
    def work(rank):
        tensor = torch.zeros(1000 * layouts[rank])
        send, receive = dict.fromkeys(range(2), tensor), {0: tensor.clone(), 1: tensor.clone()}
        try:
            exchange().all_to_all(send, receive, [], purposes[rank], 3, layout=layouts[rank])
        except ExchangeError as error:
            torch.distributed.init_process_group(
                "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
            )
            return str(error)
        return ""

    assert all(expected in message for message in run_ranks(work, 2, tmp_path))


def test_too_many_broken_rows_are_rejected_or_dropped():
    rows = torch.ones(4, 3)
    rows[:2] = math.nan
    strict, lenient = (ShardedRule(Mean(1), drops_more=more) for more in (False, True))
    rejected = strict.decide(rows, [0], None, None, 0)
    assert isinstance(rejected, NoResult)
    assert rejected.faulty == [0, 1]
    plan = lenient.decide(rows, [0], None, None, 0)
    assert torch.equal(lenient.carry_out(plan, rows, None), torch.ones(3))
    assert lenient.report.dropped == (0, 1)


def test_absent_rows_do_not_count_as_faulty():
    rows = torch.ones(5, 3)
    rows[0], rows[1] = math.nan, 7.0
    sharded = ShardedRule(get_aggregator("trmean", 1))
    plan = sharded.decide(rows, [1, 0, 0, 0, 0], None, None, 0)
    assert torch.equal(sharded.carry_out(plan, rows, None), torch.ones(3))
    assert (sharded.report.absent, sharded.report.dropped) == ((0,), ())
    few = sharded.decide(rows[:3], [1, 0, 0], None, None, 0)  # of two workers none may be faulty
    assert isinstance(few, NoResult)
    assert "have no gradient, and the others are too few" in few.reason
