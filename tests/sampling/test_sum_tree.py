"""The sum tree against numbers by hand, running sums in NumPy, and the law it promises to draw from."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lightning_sgd.sampling import SumTree

WEIGHTS = torch.tensor([3, 10, 12, 4, 1, 2, 8, 2], dtype=torch.float64)
CHI_SQUARE_19_DOF = 43.8  # 0.999 quantile
TOPS = pytest.mark.parametrize("num_top", [1, 2, 4, 1024])


def tree_of(weights, **settings):
    tree = SumTree(len(weights), **settings)
    tree.rebuild(weights)
    return tree


def find(tree, *masses):
    return tree.find(torch.tensor(masses, dtype=torch.float64)).tolist()


def test_the_sums_drawn_by_hand():
    # Leaves 3 10 12 4 1 2 8 2; above them 13 16 3 10, then 29 13, then 42.
    tree = tree_of(WEIGHTS, num_top=1)
    assert tree._nodes[1:].tolist() == [42, 29, 13, 13, 16, 3, 10, *WEIGHTS.tolist()]


@TOPS
def test_masses_found_by_hand(num_top):
    tree = tree_of(WEIGHTS, num_top=num_top)
    assert find(tree, 0, 2.999, 3, 12.999, 13, 24, 25, 29, 41.999) == [0, 0, 1, 1, 2, 2, 3, 4, 7]
    tree.set(torch.tensor([2]), torch.zeros(1))
    assert tree.total == 30
    assert find(tree, 13) == [3]
    tree.set(torch.tensor([0]), torch.zeros(1))
    assert find(tree, 0) == [1]


@TOPS
def test_masses_beyond_the_ends_never_find_an_empty_leaf(num_top):
    # Rounding in the caller can give a mass of exactly the total.
    weights = torch.tensor([0.0, 0.1, 0.2, 0.0, 0.0])
    tree = tree_of(weights, num_top=num_top)
    assert find(tree, -1, 0, tree.total, 2 * tree.total) == [1, 1, 2, 2]


@TOPS
@pytest.mark.parametrize("num_leaves", [1, 2, 3, 7, 8, 1000])
def test_find_is_a_search_in_the_running_sums(num_leaves, num_top):
    random = np.random.default_rng(num_leaves)
    # Multiples of 1/256: sums are exact, whatever their order.
    weights = random.integers(1, 1000, num_leaves) / 256 * (random.random(num_leaves) > 0.3)
    weights[random.integers(num_leaves)] = 1.0
    tree = tree_of(torch.from_numpy(weights), num_top=num_top)
    masses = random.integers(0, 10**9, 100_000) / 10**9 * weights.sum()
    expected = np.searchsorted(np.cumsum(weights), masses, side="right")
    assert np.array_equal(tree.find(torch.from_numpy(masses)).numpy(), expected)


@TOPS
def test_sums_do_not_drift(num_top):
    tree, generator = SumTree(1000, num_top), torch.Generator().manual_seed(0)
    for _ in range(100):
        indices = torch.randint(1000, (1000,), generator=generator)
        tree.set(indices, torch.rand(1000, generator=generator, dtype=torch.float64))
    exact = math.fsum(tree.weights.tolist())
    assert tree.total == pytest.approx(exact, rel=1e-12)
    # A tree after many updates is the tree of its leaves, to the last bit: checkpoints hold leaves only.
    assert np.array_equal(
        tree._nodes[tree._num_top :], tree_of(tree.weights, num_top=num_top)._nodes[tree._num_top :]
    )


def test_of_an_index_that_comes_twice_the_last_weight_counts():
    tree = SumTree(4, num_top=1)
    tree.set(torch.tensor([1, 1, 3]), torch.tensor([5.0, 2.0, 1.0]))
    assert tree.weights.tolist() == [0, 2, 0, 1]
    assert tree.total == 3


@pytest.mark.parametrize("stratified", [False, True])
def test_draws_follow_the_weights(stratified):
    weights = torch.rand(1000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    tree = tree_of(weights, num_top=16)
    drawn, probabilities = tree.sample(100_000, torch.Generator().manual_seed(2), stratified)
    assert torch.allclose(probabilities, weights[drawn] / weights.sum())
    bins = np.minimum(np.cumsum(weights.numpy())[drawn] / weights.sum().item() * 20, 19).astype(int)
    borders = (np.cumsum(weights.numpy()) / weights.sum().item() * 20).clip(max=19).astype(int)
    expected = np.bincount(borders, weights.numpy(), 20) / weights.sum().item() * 1e5
    statistic = ((np.bincount(bins, minlength=20) - expected) ** 2 / expected).sum()
    assert statistic < CHI_SQUARE_19_DOF


def test_stratified_draws_have_one_in_every_part():
    tree = tree_of(torch.ones(64))
    drawn, _ = tree.sample(64, torch.Generator().manual_seed(0), stratified=True)
    assert drawn.tolist() == list(range(64))


def test_more_than_2_to_the_24_samples():
    # torch.multinomial and WeightedRandomSampler raise there, and float32 sums never draw the upper half.
    num = 2**24 + 3
    weights = torch.ones(num)
    weights[: num // 2] = 2.0
    tree = tree_of(weights)
    drawn, _ = tree.sample(10_000, torch.Generator().manual_seed(0))
    share = (drawn >= num // 2).double().mean().item()
    assert share == pytest.approx(1 / 3, abs=4 * math.sqrt(2 / 9 / 10_000))


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: SumTree(0), r"Expected `num_leaves` to be at least 1, got 0\."),
        (lambda: SumTree(1, num_top=0), r"Expected `num_top` to be at least 1, got 0\."),
        (lambda: SumTree(2).rebuild(torch.ones(3)), r"Expected `weights` to be of shape \(2,\)"),
        (lambda: SumTree(2).rebuild(torch.tensor([1.0, -1.0])), "finite and not negative"),
        (lambda: SumTree(2).set(torch.tensor([0]), torch.tensor([math.nan])), "finite and not"),
        (lambda: SumTree(2).set(torch.tensor([0]), torch.tensor([math.inf])), "finite and not"),
        (lambda: SumTree(2).set(torch.tensor([2]), torch.ones(1)), r"`indices` to be in \[0, 2\)"),
        (lambda: SumTree(2).set(torch.tensor([-1]), torch.ones(1)), r"`indices` to be in \[0, 2\)"),
        (lambda: SumTree(2).sample(1, torch.Generator()), "positive somewhere, got 0.0"),
    ],
)
def test_what_cannot_work_is_refused(act, message):
    with pytest.raises(ValueError, match=message):
        act()
