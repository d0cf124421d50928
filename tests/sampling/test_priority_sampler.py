"""The sampler: the same draws on any number of ranks and workers, their probabilities, and going on exactly."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from lightning_sgd.sampling import PriorityBatchSampler, PrioritySampler
from lightning_sgd.sampling.priority_loader import PriorityDataLoader


class Numbers(Dataset):
    """Sample i is the number i."""

    def __init__(self, num):
        self.num = num

    def __len__(self):
        return self.num

    def __getitem__(self, index):
        return index


def score_of(draw, step):
    """Any function of sample and time, the same on all ranks."""
    return (draw.indices.float() * 0.7 + step).sin().abs() + 0.01


def run(num_samples, batch, num_ranks, num_epochs=3, **settings):
    """Local batches by rank, and the draws, of a training that changes all scores that it meets."""
    samplers = [
        PrioritySampler(num_samples, batch // num_ranks, num_ranks, rank, seed=5, **settings)
        for rank in range(num_ranks)
    ]
    local, draws = [[] for _ in samplers], []
    for epoch in range(num_epochs):
        for sampler in samplers:
            sampler.set_epoch(epoch)
        for parts in zip(*(sampler.batches() for sampler in samplers), strict=True):
            taken = [sampler.take() for sampler in samplers]
            for sampler, draw, part, mine in zip(samplers, taken, parts, local, strict=True):
                mine.append(part)
                sampler.update(draw, score_of(draw, len(draws)))
            draws.append(taken[0])
    return samplers, local, draws


@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("num_samples", [64, 61, 3])
@pytest.mark.parametrize("order", ["proportional", "rank", "top"])
def test_ranks_draw_what_one_process_draws(num_samples, num_ranks, order):
    samplers, local, draws = run(num_samples, 16, num_ranks, order=order)
    (one,), _, expected = run(num_samples, 16, 1, order=order)
    assert len(draws) == len(expected) == 3 * math.ceil(num_samples / 16)
    for step, (draw, alone) in enumerate(zip(draws, expected, strict=True)):
        num = len(alone.indices)  # after it comes padding, in the last batch of the warm-up
        assert torch.equal(draw.indices[:num], alone.indices)
        assert torch.equal(draw.probabilities[:num], alone.probabilities)
        assert len(draw.indices) - num == draw.num_padded < num_ranks
        assert [i for mine in local for i in mine[step]] == draw.indices.tolist()
        assert len({len(mine[step]) for mine in local}) == 1
    if num_samples % num_ranks == 0:
        for sampler in samplers:
            assert torch.equal(sampler.probabilities(), one.probabilities())
    assert torch.equal(samplers[0].table.tree.weights, samplers[-1].table.tree.weights)


def test_the_warm_up_has_the_order_of_a_distributed_sampler():
    sampler = PrioritySampler(50, 8, seed=3, warmup_epochs=2)
    expected = DistributedSampler(range(50), num_replicas=1, rank=0, seed=3)
    for epoch in (0, 1):
        sampler.set_epoch(epoch)
        expected.set_epoch(epoch)
        assert list(sampler) == list(expected)
    assert len(sampler) == len(expected) == 50


def test_padding_weighs_nothing_and_the_others_make_up_for_it():
    sampler = PrioritySampler(9, 2, num_replicas=4, rank=0)
    *_, _ = sampler.batches()
    first, second = sampler.pending
    assert (first.num_padded, second.num_padded) == (0, 3)
    assert first.weights(9, 1.0) is None
    assert second.weights(9, 1.0).tolist() == [4, 0, 0, 0]


def test_probabilities_by_hand():
    # Scores 1, 0, 3, 0 with ε = 0.5 × mean 1 and λ = 0.2: (s + 0.5) / 6 × 0.8 + 0.05.
    sampler = PrioritySampler(4, 4, uniform_mix=0.2, offset=0.5, half_life=None)
    list(sampler)
    draw = sampler.take()
    sampler.update(draw, torch.tensor([1.0, 0.0, 3.0, 0.0])[draw.indices])
    sampler.set_epoch(1)
    next(sampler.batches())
    expected = [1.5 / 6 * 0.8 + 0.05, 0.5 / 6 * 0.8 + 0.05, 3.5 / 6 * 0.8 + 0.05]
    assert sampler.probabilities().tolist() == pytest.approx([*expected, expected[1]])
    drawn = sampler.take()
    assert torch.allclose(drawn.probabilities, sampler.probabilities(drawn.indices))
    assert drawn.smallest_probability == pytest.approx(expected[1])
    weights = drawn.weights(4, 1.0)
    assert torch.allclose(weights.double(), 1 / (4 * drawn.probabilities))
    largest = drawn.weights(4, 1.0, "max").max()
    assert torch.allclose(largest, weights.max() * 4 * expected[1])


def test_weights_are_those_of_the_moment_of_the_draw():
    # Prefetched batches are trained on when all priorities have changed.
    sampler = PrioritySampler(8, 8, warmup_epochs=0)
    sampler.update(sampler.draw(), torch.arange(8.0))
    sampler.take()
    draw = sampler.draw()
    before = sampler.probabilities(draw.indices).clone()
    sampler.table.update(torch.arange(8), torch.arange(8.0, 0.0, -1))
    assert torch.equal(sampler.take().probabilities, before)
    assert not torch.allclose(sampler.probabilities(draw.indices), before)


@pytest.mark.parametrize("settings", [{"alpha": 0.0}, {"uniform_mix": 1.0}])
def test_without_preference_draws_are_uniform_and_weights_exactly_one(settings):
    sampler = PrioritySampler(1000, 500, warmup_epochs=0, **settings)
    sampler.update(sampler.draw(), torch.rand(500))
    draw = sampler.draw()
    assert draw.weights(1000, 1.0) is None
    assert torch.allclose(draw.probabilities, torch.full((500,), 1e-3, dtype=torch.float64))
    assert draw.indices.max() < 1000


def test_without_correction_weights_are_exactly_one():
    sampler = PrioritySampler(100, 50, warmup_epochs=0)
    sampler.update(sampler.draw(), torch.rand(50))
    assert sampler.draw().weights(100, 0.0) is None


@pytest.mark.parametrize(("unseen", "expected"), [("mean", 2.0), ("max", 3.0)])
def test_samples_without_a_score_get_the_mean_or_the_largest(unseen, expected):
    # `limit_train_batches` leaves some out of the warm-up.
    sampler = PrioritySampler(4, 2, unseen=unseen, offset=0.0, uniform_mix=0.0)
    next(sampler.batches())
    draw = sampler.take()
    sampler.update(draw, torch.tensor([1.0, 3.0]))
    sampler.set_epoch(1)
    next(sampler.batches())
    others = [i for i in range(4) if i not in draw.indices.tolist()]
    ratio = sampler.probabilities(torch.tensor(others)) / sampler.probabilities(draw.indices[:1])
    assert ratio.tolist() == pytest.approx([expected] * 2)


def test_old_scores_come_half_of_the_way_to_the_mean_in_a_half_life():
    # Two updates an epoch, both with a mean of 6; then two epochs in which nothing is measured.
    sampler = PrioritySampler(4, 2, half_life=1.0)
    table = sampler.table
    table.update(torch.tensor([0, 3]), torch.tensor([0.0, 12.0]))
    table.update(torch.tensor([1, 2]), torch.tensor([4.0, 8.0]))
    for epoch in (1, 2, 3):
        sampler.set_epoch(epoch)
        for _ in sampler.batches():
            draw = sampler.take()
            sampler.update(draw, torch.full((2,), -math.inf))
    for i, distance, age in ((0, -6, 2.5), (1, -2, 2.0), (2, 2, 2.0), (3, 6, 2.5)):
        assert table.scores[i].item() == pytest.approx(6 + distance * 2**-age)


def test_scores_that_are_not_finite_count_as_the_largest():
    sampler = PrioritySampler(4, 4)
    list(sampler)
    draw = sampler.take()
    sampler.update(draw, torch.tensor([1.0, math.nan, math.inf, 5.0]))
    assert sampler.table.scores[draw.indices].tolist() == [1, 5, 5, 5]
    assert sampler.num_not_finite == 2
    sampler.update(draw, torch.full((4,), math.nan))
    assert sampler.table.scores.tolist() == [5] * 4


@pytest.mark.parametrize("pressure", [1.0, 100.0])
def test_by_rank_first_and_last_differ_by_the_pressure(pressure):
    sampler = PrioritySampler(100, 100, order="rank", uniform_mix=0.0, pressure=pressure)
    list(sampler)
    draw = sampler.take()
    sampler.update(draw, draw.indices.float())
    sampler.set_epoch(1)
    next(sampler.batches())
    p = sampler.probabilities()
    assert (p[99] / p[0]).item() == pytest.approx(pressure ** (99 / 100))
    assert (p[99] / p[98]).item() == pytest.approx(pressure ** (1 / 100))


# Loaders.


def loaders(num_workers, persistent=False):
    sampler = PrioritySampler(Numbers(40), 8, seed=1)
    settings = {"num_workers": num_workers, "persistent_workers": persistent}
    return sampler, PriorityDataLoader(Numbers(40), sampler, **settings)


@pytest.mark.parametrize(("num_workers", "persistent"), [(0, False), (2, False), (2, True)])
def test_every_batch_meets_its_draw(num_workers, persistent):
    # Prefetched batches, an epoch that is left early, workers that stay: index for index.
    sampler, loader = loaders(num_workers, persistent)
    num_drawn, draw_once = 0, sampler.draw

    def draw():
        nonlocal num_drawn
        num_drawn += 1
        return draw_once()

    sampler.draw = draw
    for epoch in range(4):
        sampler.set_epoch(epoch)
        before = num_drawn
        for number, batch in enumerate(loader):
            taken = sampler.take()
            assert batch.tolist() == taken.indices.tolist()
            sampler.update(taken, score_of(taken, number))
            ahead = min(5, number + 1 + 2 * num_workers)
            assert num_drawn - before == ahead, "drawn as far as workers prefetch, and once"
            if epoch == 1 and number == 2:
                break
        del batch


def test_the_lag_is_what_workers_prefetch():
    sampler, loader = loaders(2)
    lags = []
    for _ in loader:
        taken = sampler.take()
        lags.append(sampler.table.num_updates - taken.step)
        sampler.update(taken, score_of(taken, 0))
    assert lags == [0, 1, 2, 3, 4]


def test_plain_loaders_can_use_it():
    sampler = PrioritySampler(Numbers(20), 8)
    for loader in (
        DataLoader(Numbers(20), batch_size=8, sampler=sampler),
        DataLoader(Numbers(20), batch_sampler=PriorityBatchSampler(sampler)),
    ):
        assert len(loader) == 3
        for batch in loader:
            assert batch.tolist() == sampler.take().indices.tolist()


def test_looking_through_a_running_loader_draws_nothing():
    # Monitors take batches of their own in the middle of an epoch.
    sampler, loader = loaders(0)
    running = iter(loader)
    next(running)
    assert torch.cat(list(loader)).tolist() == list(range(40))
    assert len(sampler.pending) == 1
    sampler.take()
    assert next(running).tolist() == sampler.take().indices.tolist()


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("stop", [1, 2, 5, 6, 8, 10])
def test_going_on_is_exact_at_every_position(num_workers, stop):
    def train(sampler, loader, start, end):
        seen = []
        for epoch in range(start // 5, 3):
            sampler.set_epoch(epoch)
            for batch in loader:
                taken = sampler.take()
                assert batch.tolist() == taken.indices.tolist()
                seen.append((batch, taken.probabilities))
                sampler.update(taken, score_of(taken, start + len(seen)))
                if start + len(seen) == end:
                    return seen, sampler.state_dict()
        return seen, sampler.state_dict()

    through, _ = train(*loaders(num_workers), 0, 15)
    before, state = train(*loaders(num_workers), 0, stop)
    sampler, loader = loaders(num_workers)
    sampler.load_state_dict(state)
    after, _ = train(sampler, loader, stop, 15)
    assert len(before) + len(after) == 15
    for (batch, p), (expected, q) in zip(before + after, through, strict=True):
        assert torch.equal(batch, expected)
        assert torch.equal(p, q)


def test_a_restored_tree_is_the_same_to_the_last_bit():
    for order in ("proportional", "rank", "top"):
        (sampler,), _, _ = run(61, 8, 1, order=order)
        other = PrioritySampler(61, 8, seed=5, order=order)
        other.load_state_dict(sampler.state_dict())
        assert torch.equal(other.probabilities(), sampler.probabilities())
        assert other.table.smallest_probability == sampler.table.smallest_probability


def test_a_checkpoint_of_other_data_is_refused():
    with pytest.raises(ValueError, match="the one of the checkpoint, with 5 samples, got 4"):
        PrioritySampler(4, 2).load_state_dict(PrioritySampler(5, 2).state_dict())


def test_a_batch_that_was_not_drawn_is_refused():
    with pytest.raises(RuntimeError, match="one that it did not draw"):
        PrioritySampler(4, 2).take()


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        yield 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dataset": Stream()}, "`dataset` to be one with indices and a length, got 'Stream'"),
        ({"dataset": 0}, "`dataset` to be not empty"),
        ({"batch_size": 0}, "`batch_size` to be at least 1, got 0"),
        ({"warmup_epochs": -1}, "`warmup_epochs` to be at least 0"),
        ({"uniform_mix": 1.5}, r"`uniform_mix` to be in \[0, 1\], got 1\.5"),
        ({"alpha": math.nan}, "`alpha` to be a number ≥ 0"),
        ({"offset": -1.0}, "`offset` to be a number ≥ 0"),
        ({"half_life": 0.0}, "`half_life` to be a positive number of epochs"),
        ({"order": "random"}, "`order` to be one of proportional, rank, top"),
        ({"unseen": "zero"}, "`unseen` to be one of mean, max"),
        ({"pressure": 0.5}, "`pressure` to be at least 1"),
        ({"top": 0.0}, r"`top` to be in \(0, 1\]"),
    ],
)
def test_bad_settings_are_refused_in_one_sentence(settings, message):
    with pytest.raises(ValueError, match=message):
        PrioritySampler(**{"dataset": 4, "batch_size": 2, **settings})
