"""Short vectors that have the norms and inner products of gradients, up to a small error without a bias.

A count sketch adds every coordinate, with a random sign, to a random one of a few buckets. Products of two different
coordinates have the mean 0 by their signs, so that for all x and y

    E⟨Sx, Sy⟩ = ⟨x, y⟩.

Here blocks of 16 neighbours go to the same bucket for blocks, which takes a sixteenth of the random numbers and adds
whole vectors. Every place has a sign of its own all the same: without, equal rows in the gradient of a layer, which are
the rule for few samples, would cost most of the width. With k buckets for the blocks x_r of a parameter

    Var ‖Sx‖² = (2/k)·Σ_{r ≠ q} Σ_i x_ri²·x_qi² ≤ (2/k)·‖x‖⁴,

which is (2/16k)·‖x‖⁴ for numbers of one size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from lightning_sgd.functional.gradient_sample import flattened, wide_dtype

BLOCK = 16
"""Coordinates that go to one bucket."""
_PIECE = 2**17
"""Coordinates that are taken at a time; they stay in the cache."""
_SHIFT, _NUM_SHIFTS = 977, 2**12
"""From piece to piece the same signs begin somewhere else."""


class CountSketch:
    """A linear map that keeps norms and inner products of gradients, parameter by parameter, on average over seeds.

    One half of the width is shared out to the parameters by their sizes, the other half equally. Small parameters are
    kept as they are. Cost of a gradient: a pass over it; memory of the map: four bytes for sixteen coordinates, and at
    most half a megabyte for signs.

    Args:
        sizes: Number of coordinates by parameter.
        num_coordinates: Width of the sketch, about; ``None`` keeps gradients as they are.
        seed: Decides on buckets and signs.

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
        self._signs = torch.randint(2, (num_signs,), generator=generator, dtype=torch.int8) * 2 - 1
        whole = max(sum(sizes.values()), 1)
        self.layers: dict[str, slice] = {}
        self._buckets: list[Tensor | None] = []
        self._num_buckets: list[int] = []
        begin = 0
        for name, size in sizes.items():
            wanted = num_coordinates and num_coordinates * (size / whole + 1 / len(sizes)) / 2
            num = None if wanted is None else max(1, round(wanted / BLOCK))
            buckets = None if num is None or num * BLOCK >= size else _draw(size, num, generator)
            width = size if buckets is None or num is None else num * BLOCK
            self._buckets.append(buckets)
            self._num_buckets.append(num or 0)
            self.layers[name] = slice(begin, begin + width)
            begin += width
        self.num_coordinates = begin

    def of(self, tensors: Sequence[Tensor]) -> Tensor:
        """The sketch of a gradient, shape (s,).

        Args:
            tensors: One for each parameter, in order.
        """
        parts = [self.part(number, tensor) for number, tensor in enumerate(tensors)]
        wide = wide_dtype(parts)
        return torch.cat([part.to(wide) for part in parts])

    def part(self, number: int, tensor: Tensor) -> Tensor:
        """The columns that belong to one parameter.

        Args:
            number: Place of the parameter.
            tensor: Of its shape.
        """
        flat, buckets = flattened(tensor), self._buckets[number]
        if buckets is None:
            return flat
        self._buckets[number] = buckets = buckets.to(flat.device)
        self._signs = self._signs.to(flat.device)
        wide = wide_dtype([flat])
        # Whole blocks have a sign, too, so that places with the same sign do not add up: two buckets for each.
        both = torch.zeros(2 * self._num_buckets[number], BLOCK, dtype=wide, device=flat.device)
        for count, piece in enumerate(torch.split(flat, _PIECE)):
            begin = count * _SHIFT % _NUM_SHIFTS
            signed = piece.to(wide) * self._signs[begin : begin + len(piece)]
            blocks = pad(signed, (0, -len(piece) % BLOCK)).view(-1, BLOCK)
            first = count * (_PIECE // BLOCK)
            both.index_add_(0, buckets[first : first + len(blocks)], blocks)
        plus, minus = both.chunk(2)
        return (plus - minus).flatten()


def _draw(size: int, num_buckets: int, generator: torch.Generator) -> Tensor:
    """For each block its bucket, of twice as many: those of the second half are subtracted."""
    num_blocks = -(-size // BLOCK)
    return torch.randint(2 * num_buckets, (num_blocks,), generator=generator, dtype=torch.int32)
