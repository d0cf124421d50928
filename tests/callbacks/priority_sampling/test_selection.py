"""Selections look at more samples than are trained on."""

from __future__ import annotations

import math
from collections import UserDict
from typing import NamedTuple

import pytest
import torch
from support.priority_training import (
    BATCHES,
    B,
    C,
    Clusters,
    D,
    Linear,
    N,
    as_sample,
    fit,
    loader,
    parts,
    quiet,
    ranks,
)
from support.watching import assert_equal
from torch.nn.functional import cross_entropy
from torch.utils.data import default_collate

from lightning_sgd import InBatchSelection, Presampling


def test_presampling_is_on_where_it_pays(tmp_path):
    # The gain is 0 before the first step, and never below 1 afterwards.
    rule = Presampling(factor=3.0, threshold=0.5, decay=0.0)
    module, draws, _ = fit(tmp_path, quiet(selection=rule), max_epochs=1)
    assert [len(draw.indices) for draw in draws] == [B] + [3 * B] * (BATCHES - 1)
    assert [len(batch) for batch in module.seen] == [B] * BATCHES
    for batch, draw in zip(module.seen, draws, strict=True):
        assert set(batch) <= set(draw.indices.tolist())
    assert module.seen[0] == draws[0].indices.tolist()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_presampling_stays_off_where_it_does_not(tmp_path, num_workers):
    rule = Presampling(factor=3.0, threshold=9.0)
    data = loader(num_workers=num_workers)
    module, draws, _ = fit(tmp_path, quiet(selection=rule), data=data)
    assert module.seen == [draw.indices.tolist() for draw in draws]
    assert rule.num_on == 0
    assert 0 < rule.gain < 2


def test_presampling_is_the_paper_by_hand(tmp_path):
    # One candidate batch at zero weights and one training step of it.
    rule = Presampling(factor=3.0, threshold=0.5, decay=0.0)
    callback = quiet(selection=rule, score="last_layer")
    module, draws, _ = fit(tmp_path, callback, max_epochs=1, max_steps=2, limit_val_batches=0)
    data, first = Clusters(), draws[0].indices
    weight = torch.zeros(C, D + 1)
    x = torch.cat([data.x, torch.ones(N, 1)], dim=1)
    pull = (x[first] @ weight.T).softmax(1) - torch.eye(C)[data.y[first]]
    weight -= 0.5 * pull.T @ x[first] / B
    candidates = draws[1].indices
    pull = (x[candidates] @ weight.T).softmax(1) - torch.eye(C)[data.y[candidates]]
    scores = pull.norm(dim=1) * x[candidates].norm(dim=1)
    gamma = scores / scores.sum()
    loss = torch.zeros(())
    for number in module.seen[1]:
        row = candidates.tolist().index(number)
        logits = x[number] @ weight.T
        loss = loss + cross_entropy(logits, data.y[number]) / (3 * B * gamma[row]) / B
    assert module.losses[1] == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.slow
def test_presampling_is_unbiased():
    # Any scores: the weighted mean over draws of b of B candidates is the mean over the candidates.
    generator = torch.Generator().manual_seed(0)
    rule, values = Presampling(), torch.randn(24, generator=generator)
    rule.prepare(8)
    scores = torch.rand(24, generator=generator)
    means = []
    for _ in range(4000):
        rows, weights = rule.choose(scores, torch.rand(24, generator=generator))
        means.append((weights * values[rows]).mean())
    found = torch.stack(means)
    error = found.std() / math.sqrt(len(found))
    assert abs(found.mean() - values.mean()) < 4 * error


@pytest.mark.parametrize("rule", ["quantile", "percentile", "top"])
def test_a_part_of_each_batch_is_trained_on(tmp_path, rule):
    selection = InBatchSelection(keep=0.5, rule=rule, start=0.0, end=1.0, interrupt=0)
    callback = quiet(selection=selection, score="loss")
    module, draws, _ = fit(tmp_path, callback)
    drawn = [draw.indices.tolist() for draw in draws]
    assert all(set(part) <= set(whole) for part, whole in zip(module.seen, drawn, strict=True))
    if rule != "percentile":
        sizes = [max(1, len(whole) // 2) for whole in drawn]
        assert [len(part) for part in module.seen] == sizes
    assert callback.run.num_trained == sum(map(len, module.seen))
    everything = [index for whole in drawn for index in whole]
    assert sorted(everything[:N]) == list(range(N)), "epochs stay permutations"


def test_the_largest_losses_are_trained_on(tmp_path):
    selection = InBatchSelection(keep=0.25, rule="top", start=0.0, end=1.0, interrupt=0)
    module, draws, _ = fit(tmp_path, quiet(selection=selection, score="loss"), max_epochs=1)
    data = Clusters()
    first = draws[0].indices
    weight, bias = torch.zeros(C, D), torch.zeros(C)
    rows = sorted(first.tolist()[:2])  # all losses are equal at first
    assert len(module.seen[0]) == len(rows)
    chosen = torch.tensor(module.seen[0])
    pull = torch.full((2, C), 1 / C) - torch.eye(C)[data.y[chosen]]
    weight, bias = -0.5 * pull.T @ data.x[chosen] / 2, -0.5 * pull.mean(0)
    second = draws[1].indices
    losses = cross_entropy(data.x[second] @ weight.T + bias, data.y[second], reduction="none")
    assert set(module.seen[1]) == set(second[losses.topk(2).indices].tolist())


def test_selection_begins_ends_and_pauses(tmp_path):
    selection = InBatchSelection(keep=0.5, rule="top", start=0.25, end=0.75, interrupt=3)
    module, _, _ = fit(tmp_path, quiet(selection=selection), max_epochs=4)
    total = 4 * BATCHES
    expected = []
    for step in range(total):
        size = N % B if step % BATCHES == BATCHES - 1 else B
        is_on = 0.25 <= step / total < 0.75 and (step + 1) % 3
        expected.append(size // 2 if is_on else size)
    assert [len(batch) for batch in module.seen] == expected


def test_looking_leaves_no_trace(tmp_path):
    # Batch statistics and logs of the candidates would be counted twice.
    class Normed(Linear):
        def __init__(self):
            super().__init__()
            self.norm = torch.nn.BatchNorm1d(D)

        def training_step(self, batch, batch_idx):
            _, x, y = batch
            self.log("size", float(len(y)), on_step=False, on_epoch=True, reduce_fx="sum")
            return cross_entropy(self.layer(self.norm(x)), y)

    selection = InBatchSelection(keep=0.5, rule="top", start=0.0, end=1.0, interrupt=0)
    data = loader(num=48)
    module, _, running = fit(tmp_path, quiet(selection=selection), Normed(), data, max_epochs=1)
    assert module.norm.num_batches_tracked == 6
    assert module.norm.training
    assert running.callback_metrics["size"] == 6 * (B // 2)


@pytest.mark.parametrize("rule", ["presampling", "quantile"])
def test_selection_on_two_ranks(tmp_path, rule):
    selection = (
        Presampling(threshold=0.0)
        if rule == "presampling"
        else InBatchSelection(start=0.0, end=1.0, interrupt=0)
    )
    first, second = ranks(tmp_path, 2, settings={"selection": selection})
    assert_equal(first["indices"], second["indices"], "what was drawn")
    assert_equal(first["state"], second["state"], "the state")
    assert torch.equal(first["weight"], second["weight"])


class Pair:
    """A batch that only moves, as those of graph libraries do."""

    def __init__(self, index, x, y):
        self.index, self.x, self.y = index, x, y

    def to(self, *args, **kwargs):
        return self

    def __iter__(self):
        return iter((self.index, self.x, self.y))


class Frozen(NamedTuple):
    index: torch.Tensor
    x: torch.Tensor
    y: torch.Tensor


def as_pair(items):
    return Pair(*default_collate(items))


def as_named(items):
    return Frozen(*default_collate(items))


def as_mapping(items):
    return UserDict(zip(("index", "x", "y"), default_collate(items), strict=True))


class Takes(Linear):
    """Takes its batch apart, and changes the inputs in place."""

    def training_step(self, batch, batch_idx):
        if isinstance(batch, (dict, UserDict)):
            batch = [batch.pop(name) for name in ("index", "x", "y")]
        index, x, y = parts(batch)
        return super().training_step((index, x.mul_(2.0), y), batch_idx)


@pytest.mark.parametrize("collate", [as_pair, as_named, as_mapping, as_sample, None])
def test_steps_that_change_their_batch_see_a_fresh_one(tmp_path, collate):
    # Inputs are doubled once, however often the step runs: the scores are those of twice the data.
    selection = InBatchSelection(keep=0.5, rule="top", start=0.0, end=1.0, interrupt=0)
    callback = quiet(selection=selection, score="loss", half_life=None)
    module = Takes(lr=0.0)
    with torch.no_grad():
        module.layer.weight.copy_(torch.arange(C * D).reshape(C, D) / 10)
    batch_format = "dict" if collate is None else "tuple"
    data = loader(batch_format, collate_fn=collate)
    fit(tmp_path, callback, module, data, watch=False, max_epochs=1)
    points = Clusters()
    logits = (2 * points.x @ module.layer.weight.T).detach()
    expected = cross_entropy(logits, points.y, reduction="none")
    torch.testing.assert_close(callback.run.sampler.table.scores, expected)


def test_objects_with_other_rows_are_refused(tmp_path):
    def collate(items):
        batch = as_pair(items)
        batch.edges = torch.zeros(2, 30)
        return batch

    selection = InBatchSelection(start=0.0, end=1.0, interrupt=0)
    message = (
        r"every tensor of Pair to have one row for each of the 8 samples .*got shape \(2, 30\)"
    )
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, quiet(selection=selection), data=loader(collate_fn=collate), watch=False)
