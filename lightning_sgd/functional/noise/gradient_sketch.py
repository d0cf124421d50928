"""Short vectors that have the norms and inner products of gradients up to a small, unbiased error.

A count sketch adds every coordinate, with a random sign, to a random one of a few buckets. Products of two different
coordinates have the mean 0 because of their signs, so that for all x and y

    E⟨Sx, Sy⟩ = ⟨x, y⟩.

Here blocks of 16 neighbours go to the same bucket for blocks, which takes a sixteenth of the random numbers and adds
whole vectors. Still every coordinate has a sign of its own: otherwise equal rows in the gradient of a layer, which are
common for few samples, would waste most of the width. With k buckets for the blocks x_r of a parameter

    Var ‖Sx‖² = (2/k)·Σ_{r ≠ q} Σ_i x_ri²·x_qi² ≤ (2/k)·‖x‖⁴,

which is (2/16k)·‖x‖⁴ for numbers of one size.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from lightning_sgd.functional.noise.gradient_sample import Columns, flattened, wide_dtype

BLOCK = 16
"""Number of coordinates that go to one bucket."""
_PIECE = 2**17
"""Number of coordinates at a time; they stay in the cache."""
_SHIFT, _NUM_SHIFTS = 977, 2**12
"""In each piece the same signs are used from another beginning on."""


class CountSketch(Columns):
    """A linear map that keeps norms and inner products of gradients, parameter by parameter, on average over seeds.

    One half of the width is divided among the parameters by their sizes, the other half equally. Small parameters are
    kept as they are. Cost of a gradient: one pass. Memory: four bytes for sixteen coordinates, at most half a megabyte
    for signs, and temporarily a copy of the gradient of one parameter.

    Args:
        sizes: Number of coordinates by parameter.
        num_coordinates: Approximate width of the sketch; ``None`` keeps gradients as they are.
        seed: Seed of buckets and signs.

    Attributes:
        layers: Which columns belong to which parameter.
        num_coordinates: Width of the sketch.

    Example:
        >>> sketch = CountSketch({"weight": 100_000, "bias": 100}, num_coordinates=10_000, seed=0)
        >>> generator = torch.Generator().manual_seed(0)
        >>> gradient = [torch.randn(size, generator=generator) for size in (100_000, 100)]
        >>> row = sketch.of(gradient)
        >>> [round(float(row[part].norm() / x.norm()), 1) for part, x in zip(sketch.layers.values(), gradient)]
        [1.0, 1.0]
    """

    def __init__(self, sizes: Mapping[str, int], num_coordinates: int | None, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        num_signs = min(_PIECE, max(sizes.values(), default=0)) + _NUM_SHIFTS
        # Not in a narrower type: products of two different types are ten times as slow.
        self._signs = torch.randint(2, (num_signs,), generator=generator).float() * 2 - 1
        whole = max(sum(sizes.values()), 1)
        self.layers = {}
        self._bags: list[tuple[Tensor, Tensor] | None] = []
        begin = 0
        for name, size in sizes.items():
            wanted = num_coordinates and num_coordinates * (size / whole + 1 / len(sizes)) / 2
            num = None if wanted is None else max(1, round(wanted / BLOCK))
            bags = None if num is None or num * BLOCK >= size else _draw(size, num, generator)
            width = size if bags is None or num is None else num * BLOCK
            self._bags.append(bags)
            self.layers[name] = slice(begin, begin + width)
            begin += width
        self.num_coordinates = begin

    def part(self, number: int, tensor: Tensor) -> Tensor:
        """Compute the columns of one parameter.

        Args:
            number: Index of the parameter.
            tensor: Tensor of the parameter's shape.
        """
        flat, bags = flattened(tensor), self._bags[number]
        if bags is None:
            return flat
        order, begins = self._bags[number] = bags[0].to(flat.device), bags[1].to(flat.device)
        # Sums over lists of rows are several times as fast as `index_add`.
        both = embedding_bag(order, self._signed(flat).view(-1, BLOCK), begins, mode="sum")
        plus, minus = both.chunk(2)
        return (plus - minus).flatten()

    def _signed(self, flat: Tensor) -> Tensor:
        """Copy to at least float32, padded to whole blocks, with random signs."""
        self._signs = signs = self._signs.to(flat.device, wide_dtype([flat]))
        signed = signs.new_zeros(-(-len(flat) // BLOCK) * BLOCK)
        for count, piece in enumerate(torch.split(flat, _PIECE)):
            begin = count * _SHIFT % _NUM_SHIFTS
            into = signed[count * _PIECE :][: len(piece)]
            torch.mul(piece.to(signs.dtype), signs[begin : begin + len(piece)], out=into)
        return signed


def _draw(size: int, num_buckets: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw the blocks of each bucket, bucket after bucket, and where each bucket begins.

    There are twice as many buckets, and those of the second half are subtracted: so whole blocks have a random sign,
    too, and blocks whose signs repeat do not add up.
    """
    num_blocks = -(-size // BLOCK)
    buckets = torch.randint(2 * num_buckets, (num_blocks,), generator=generator)
    counts = torch.bincount(buckets, minlength=2 * num_buckets)
    return buckets.argsort(stable=True).int(), (counts.cumsum(0) - counts).int()
