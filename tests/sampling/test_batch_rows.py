"""Which sample each row of a batch belongs to, for collates as users write them; every sample carries its number."""

from __future__ import annotations

from collections import UserDict
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, default_collate

from lightning_sgd.sampling.batch_rows import BatchRows, FollowedCollate

G = torch.Generator().manual_seed(0)
NUM = 7
LENGTHS = [4, 2, 6, 3, 6, 1, 5]
KINDS = [0, 1, 1, 0, 2, 1, 0]


def tensor_items():
    return [(torch.rand(3, 4, generator=G), torch.tensor(KINDS[i]), i) for i in range(NUM)]


def number_items():
    return [
        (np.random.default_rng(i).random(4).astype(np.float32), KINDS[i], i) for i in range(NUM)
    ]


def text_items():
    words = torch.randint(1, 90, (NUM, 8), generator=G)
    return [
        {"ids": words[i, : LENGTHS[i]], "label": torch.tensor(KINDS[i]), "number": i}
        for i in range(NUM)
    ]


def list_items():
    return [
        {"ids": each["ids"].tolist(), "label": KINDS[i], "number": i}
        for i, each in enumerate(text_items())
    ]


def by_key(items):
    return sorted(items, key=lambda item: -float(item[0].sum()))


def by_length(items):
    return sorted(items, key=lambda item: -len(item["ids"]))


def in_order(items):
    return default_collate(items)


def sorted_rows(items):
    return default_collate(by_key(items))


def dropped_rows(items):
    return default_collate([item for item in items if item[1] != 1])


def one_left(items):
    return default_collate([item for item in items if item[1] == 2])


def replaced(items):
    return default_collate([item if item[1] != 1 else items[0] for item in items])


def as_dict(items):
    x, y, number = default_collate(by_key(items))
    return {"x": x / 255, "y": y, "number": number}


def permuted_after(items):
    x, y, number = default_collate(items)
    order = x.sum((1, 2)).argsort()
    return x[order].permute(0, 2, 1), y[order], number[order]


def flipped_after(items):
    return [each.flip(0) for each in default_collate(items)]


def augmented(items):
    x = torch.stack([item[0].flip(-1) + torch.rand(3, 4) for item in reversed(items)])
    return x.float().sub_(0.5), torch.tensor([item[2] for item in reversed(items)])


def detection(items):
    return tuple(zip(*by_key(items), strict=True))


def the_items(items):
    return by_key(items)


def by_assignment(items):
    items = by_key(items)
    x = torch.zeros(len(items), 3, 4)
    for row, item in enumerate(items):
        x[row, : len(item[0])] = item[0]
    return x, torch.tensor([item[2] for item in items])


def by_numpy(items):
    items = by_key(items)
    x = np.stack([np.asarray(item[0]) for item in items])
    return torch.from_numpy(x), torch.tensor([item[2] for item in items])


@dataclass
class Pair:
    x: torch.Tensor
    number: torch.Tensor


def as_object(items):
    return Pair(*(default_collate(by_key(items))[k] for k in (0, 2)))


def padded(items):
    items = by_length(items)
    return UserDict(
        ids=pad_sequence([item["ids"] for item in items], batch_first=True),
        number=torch.tensor([item["number"] for item in items]),
    )


def padded_time_first(items):
    lengths = torch.tensor([len(item["ids"]) for item in items])
    order = lengths.argsort(descending=True, stable=True)
    ids = pad_sequence([item["ids"] for item in items])[:, order]
    return ids, torch.tensor([item["number"] for item in items])[order]


def tokenized(items):
    """As collators of text do: lists are padded, and tensors are made of lists; items are taken apart."""
    items = by_length(items)
    longest = max(len(item["ids"]) for item in items)
    numbers = [item.pop("number") for item in items]
    ids = [item["ids"] + [0] * (longest - len(item["ids"])) for item in items]
    mask = [[1] * len(item["ids"]) + [0] * (longest - len(item["ids"])) for item in items]
    return {
        "input_ids": torch.tensor(ids),
        "attention_mask": torch.tensor(mask),
        "number": torch.tensor(numbers),
    }


def tokenized_left(items):
    longest = max(len(item["ids"]) for item in items)
    ids = [[0] * (longest - len(item["ids"])) + item["ids"] for item in items]
    return {
        "input_ids": torch.tensor(ids),
        "number": torch.tensor([item["number"] for item in items]),
    }


def number_of(batch):
    """The numbers that the collate put into the batch, which the follower does not know by name."""
    if isinstance(batch, (dict, UserDict)):
        found = batch["number"]
    elif isinstance(batch, Pair):
        found = batch.number
    elif isinstance(batch[0], tuple) and isinstance(batch[0][-1], int):
        found = [item[-1] for item in batch]
    else:
        found = batch[-1]
    return [int(number) for number in found]


CASES = [
    *(
        (tensor_items, collate)
        for collate in (
            in_order,
            sorted_rows,
            dropped_rows,
            one_left,
            replaced,
            as_dict,
            permuted_after,
            flipped_after,
            augmented,
            detection,
            the_items,
            by_assignment,
            by_numpy,
            as_object,
        )
    ),
    *(
        (number_items, collate)
        for collate in (in_order, sorted_rows, dropped_rows, by_numpy, the_items)
    ),
    *((text_items, collate) for collate in (padded, padded_time_first, tokenized_left)),
    *((list_items, collate) for collate in (tokenized, tokenized_left)),
]


@pytest.mark.parametrize(("make", "collate"), CASES, ids=lambda each: each.__name__)
def test_rows_are_followed_to_their_samples(make, collate):
    if make is text_items and collate is tokenized_left:
        items = [{**item, "ids": item["ids"].tolist()} for item in make()]
    else:
        items = make()
    followed = FollowedCollate(collate)(items)
    rows = followed.rows
    assert rows.is_known
    assert not rows.problem
    positions = rows.of_rows(torch.arange(NUM)).tolist()
    assert positions == number_of(followed.batch)


def mixed_up(items):
    x, y, number = default_collate(items)
    return 0.3 * x + 0.7 * x[torch.randperm(NUM)], y, number


def rolled(items):
    x, y, number = default_collate(items)
    return x.roll(1, 0).mul_(0.7).add_(x.mul(0.3)), y, number  # torchvision's MixUp


def cut(items):
    x, y, number = default_collate(items)
    out = x.clone()
    out[..., 1:2, 1:2] = x.roll(1, 0)[..., 1:2, 1:2]  # torchvision's CutMix
    return out, y, number


def pairs(items):
    return torch.stack([a[0] + b[0] for a, b in zip(items, items[::-1], strict=True)]), None


def two_orders(items):
    return torch.stack([item[0] for item in items]), torch.stack([item[1] for item in items[::-1]])


@pytest.mark.parametrize("collate", [mixed_up, rolled, cut, pairs, two_orders])
def test_rows_of_several_samples_are_known_as_such(collate):
    assert FollowedCollate(collate)(tensor_items()).rows.problem


def normalized(items):
    return torch.from_numpy(np.stack([np.asarray(item[0]) / 7 for item in items]))


def test_what_cannot_be_followed_is_not_known():
    rows = FollowedCollate(normalized)(tensor_items()).rows
    assert not rows.is_known
    assert not rows.problem
    assert len(rows) == NUM


def test_samples_that_share_their_tensors_are_told_apart_where_it_matters():
    shared = [torch.rand(3, generator=G) for _ in range(3)]
    items = [(shared[i], float(i)) for i in (0, 1, 0, 2)]  # sample 0 was drawn twice
    rows = FollowedCollate(lambda each: default_collate(each[::-1]))(items).rows
    order = range(4) if rows.order is None else rows.order
    assert [items[position][1] for position in order] == [2.0, 0.0, 1.0, 0.0]


class Graph:
    """A sample that is an object of its own."""

    def __init__(self, number):
        self.x, self.number = torch.rand(number + 1, 2, generator=G), number


def test_objects_that_are_drawn_twice_keep_their_samples():
    graphs = [Graph(number) for number in range(3)]
    items = [graphs[i] for i in (0, 1, 0, 2)]
    joined = FollowedCollate(lambda each: torch.cat([graph.x for graph in each[::-1]]))(items)
    order = joined.rows.of_rows(torch.arange(4)).tolist()
    assert [items[position].number for position in order] == [2, 0, 1, 0]


def test_values_that_no_number_type_holds_are_compared_without_warnings():
    items = [{"x": np.array([float("nan"), 1e300, i]), "text": "a"} for i in range(4)]
    half = FollowedCollate(lambda each: {"x": torch.tensor(np.stack([e["x"] for e in each])).int()})
    rows = half(items).rows
    assert rows.order is None
    assert not rows.problem


def test_the_collate_sees_what_it_always_sees():
    items = tensor_items()
    seen = []

    def collate(given):
        seen.append(given)
        return default_collate(given)

    batch = FollowedCollate(collate)(items).batch
    assert seen[0] is items
    for mine, expected in zip(batch, default_collate(items), strict=True):
        assert type(mine) is type(expected)
        assert torch.equal(mine, expected)


def test_values_go_from_rows_to_samples_and_back():
    rows = BatchRows(4, order=(2, 0, 2))
    assert rows.of_rows(torch.tensor([1.0, 2.0, 3.0, 4.0])).tolist() == [3.0, 1.0, 3.0]
    found = rows.of_samples(torch.tensor([5.0, 6.0, 7.0]), missing=-1.0)
    assert found.tolist() == [6.0, -1.0, 6.0, -1.0]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_workers_send_rows_with_their_batches(num_workers):
    loader = DataLoader(
        tensor_items(), 4, collate_fn=FollowedCollate(sorted_rows), num_workers=num_workers
    )
    for number, followed in enumerate(loader):
        assert followed.rows.of_rows(
            torch.arange(4 * number, NUM if number else 4)
        ).tolist() == number_of(followed.batch)
