"""Sketches: norms and inner products without a bias, the variance that the closed form gives, linearity, layout."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_sgd.functional.noise.gradient_sample import Coordinates
from lightning_sgd.functional.noise.gradient_sketch import BLOCK, CountSketch


def vectors(kind, size=333):
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(2, size, generator=generator, dtype=torch.float64)
    if kind == "parallel blocks":  # the worst case: gradients of rank one repeat themselves
        x = torch.ones(size, dtype=torch.float64)
    return x, x + 0.5 * y


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["random", "parallel blocks"])
def test_norms_and_inner_products_have_no_bias_and_the_variance_of_the_formula(kind):
    # Over seeds, because a bias of one sketch cannot be seen in it.
    x, y = vectors(kind)
    num_seeds, norms, products = 4000, [], []
    for seed in range(num_seeds):
        sketch = CountSketch({"weight": len(x)}, 64, seed)
        assert sketch.num_coordinates == 64
        a, b = sketch.of([x]), sketch.of([y])
        norms.append(float(a @ a))
        products.append(float(a @ b))
    blocks = np.square(np.pad(x.numpy(), (0, -len(x) % BLOCK)).reshape(-1, BLOCK))
    gram = blocks @ blocks.T
    variance = 2 / 4 * (gram.sum() - np.trace(gram))
    for values, exact in ((norms, x @ x), (products, x @ y)):
        error = np.std(values) / num_seeds**0.5
        assert abs(np.mean(values) - float(exact)) < 4 * error
    assert np.var(norms) == pytest.approx(variance, rel=0.1)
    assert variance <= 2 / 4 * float(x @ x) ** 2


def test_it_is_linear_and_the_same_everywhere():
    sizes = {"weight": 500, "bias": 10}
    x, y = ([torch.randn(20, 25), torch.randn(10)] for _ in range(2))
    sketch, again = (CountSketch(sizes, 100, seed=3) for _ in range(2))
    both = sketch.of([2 * a - b for a, b in zip(x, y, strict=True)])
    torch.testing.assert_close(both, 2 * again.of(x) - again.of(y))
    assert not torch.equal(both, CountSketch(sizes, 100, seed=4).of(x))
    # Written out: every coordinate, with its sign, in its bucket.
    unit = torch.eye(500, dtype=torch.float64)
    columns = torch.stack([sketch.part(0, each) for each in unit])
    assert columns.abs().sum(dim=1).tolist() == [1.0] * 500
    torch.testing.assert_close(sketch.part(0, x[0]), (x[0].flatten().double() @ columns).float())


@given(
    sizes=st.lists(st.integers(1, 3000), min_size=1, max_size=5),
    num=st.one_of(st.none(), st.integers(1, 4000)),
)
def test_layout(sizes, num):
    sizes = {str(index): size for index, size in enumerate(sizes)}
    sketch = CountSketch(sizes, num, 0)
    row = sketch.of([torch.ones(size) for size in sizes.values()])
    ends = [0, *(part.stop for part in sketch.layers.values())]
    assert [part.start for part in sketch.layers.values()] == ends[:-1]
    assert len(row) == ends[-1] == sketch.num_coordinates <= sum(sizes.values())
    assert row.dtype == torch.float32
    for part, size in zip(sketch.layers.values(), sizes.values(), strict=True):
        assert 1 <= part.stop - part.start <= size
        if part.stop - part.start == size:
            assert row[part].tolist() == [1.0] * size
    if num is not None:
        assert sketch.num_coordinates <= num + BLOCK * len(sizes) * 1.5


def test_small_parameters_are_kept_and_narrow_types_are_added_up_in_float32():
    sketch = CountSketch({"weight": 2**16, "bias": 40}, 1000, 0)
    bias = sketch.layers["bias"]
    assert bias.stop - bias.start == 40
    values = torch.full((2**16,), 1.0, dtype=torch.bfloat16)
    row = sketch.of([values, torch.zeros(40, dtype=torch.bfloat16)])
    exact = sketch.of([values.double(), torch.zeros(40).double()])
    torch.testing.assert_close(row.double(), exact)
    assert row.dtype == torch.float32


def test_there_is_no_bias_where_signs_repeat_themselves():
    # Signs of one piece are used again sixteen pieces later at the same place of a block; they must not add up.
    size, num_seeds = 40 * 2**17, 40
    ones, ratios = torch.ones(size), []
    for seed in range(num_seeds):
        row = CountSketch({"weight": size}, 512, seed).of([ones])
        ratios.append(float(row @ row) / size)
    assert abs(np.mean(ratios) - 1) < 4 * np.std(ratios) / num_seeds**0.5
    assert np.std(ratios) == pytest.approx((2 / 512) ** 0.5, rel=0.4)


@pytest.mark.parametrize("kind", [Coordinates, CountSketch])
def test_sparse_gradients_are_what_they_are_when_dense(kind):
    dense = torch.zeros(40, 8)
    dense[3], dense[17] = 1.0, torch.arange(8.0)
    columns = kind({"embedding": 320}, 64, 0)
    assert torch.equal(columns.of([dense.to_sparse(1)]), columns.of([dense]))
