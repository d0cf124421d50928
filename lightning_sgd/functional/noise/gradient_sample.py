"""Several gradients at one point, in some of their coordinates, and the noise in them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class GradientSample:
    """Gradients of different batches at the same weights.

    Attributes:
        rows: One gradient in each row, unscaled, shape (m, s): some of its coordinates, or a sketch.
        batch_size: Samples behind one row.
        layers: Which columns belong to which parameter.
        step: Optimizer steps that led to the weights.
    """

    rows: Tensor
    batch_size: int
    layers: Mapping[str, slice]
    step: int

    @property
    def noise(self) -> Tensor:
        """The rows less their mean, times √(m/(m − 1)) for unbiased variances; these rows depend on each other."""
        num = len(self.rows)
        return (self.rows - self.rows.mean(dim=0)) * math.sqrt(num / max(num - 1, 1))

    @property
    def differences(self) -> Tensor:
        """The differences of disjoint pairs of rows over √2: independent, symmetric, with the variance of a row."""
        pairs = self.rows[: len(self.rows) // 2 * 2]
        return (pairs[0::2] - pairs[1::2]) / math.sqrt(2)

    def finite(self) -> GradientSample:
        """Return the sample without rows that are not finite."""
        rows = self.rows[self.rows.isfinite().all(dim=1)]
        return GradientSample(rows, self.batch_size, self.layers, self.step)


class Columns(ABC):
    """A map from gradients to fewer numbers, parameter by parameter.

    Attributes:
        layers: Columns of each parameter.
        num_coordinates: Number of columns [s].
    """

    layers: dict[str, slice]
    num_coordinates: int

    def of(self, tensors: Sequence[Tensor]) -> Tensor:
        """Map a gradient to its columns, shape (s,).

        Args:
            tensors: One tensor for each parameter, in order.
        """
        parts = [self.part(number, tensor) for number, tensor in enumerate(tensors)]
        # One type for a row, although parameters may have several.
        wide = wide_dtype(parts)
        return torch.cat([part.to(wide) for part in parts])

    @abstractmethod
    def part(self, number: int, tensor: Tensor) -> Tensor:
        """Map the gradient of one parameter to its columns.

        Args:
            number: Index of the parameter.
            tensor: Tensor of the parameter's shape.
        """


class Coordinates(Columns):
    """A fixed subset of the coordinates of all parameters, spread evenly over each of them.

    A parameter gets a share of the coordinates by its size, at least one. It is cut into as many equal parts, and one
    coordinate is drawn in each.

    Args:
        sizes: Number of real numbers by parameter.
        num_coordinates: Approximate number of coordinates to take in all; ``None`` for all.
        seed: Seed of the choice.

    Example:
        >>> coordinates = Coordinates({"weight": 12, "bias": 3}, num_coordinates=5, seed=0)
        >>> coordinates.layers
        {'weight': slice(0, 4, None), 'bias': slice(4, 5, None)}
        >>> coordinates.of([torch.arange(12.0).view(3, 4), torch.zeros(3)]).shape
        torch.Size([5])
    """

    def __init__(self, sizes: Mapping[str, int], num_coordinates: int | None, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        share = 1.0 if num_coordinates is None else num_coordinates / max(sum(sizes.values()), 1)
        self.indices: list[Tensor | None] = []
        self.layers = {}
        begin = 0
        for name, size in sizes.items():
            num = size if share >= 1 else min(size, max(1, round(share * size)))
            whole = num == size
            self.indices.append(None if whole else _one_in_each_part(size, num, generator))
            self.layers[name] = slice(begin, begin + num)
            begin += num
        self.num_coordinates = begin

    def part(self, number: int, tensor: Tensor) -> Tensor:
        """Select the values at the coordinates of one parameter.

        Args:
            number: Index of the parameter.
            tensor: Tensor of the parameter's shape.
        """
        flat, index = flattened(tensor), self.indices[number]
        if index is None:
            return flat
        # Kept where the gradients are, so that it is copied once.
        self.indices[number] = index = index.to(flat.device)
        return flat[index]


def wide_dtype(tensors: Iterable[Tensor]) -> torch.dtype:
    """Return float64 if the real numbers of one of the tensors have it, else float32.

    Args:
        tensors: Tensors of floating-point or complex types.
    """
    is_wide = any(x.dtype in (torch.float64, torch.complex128) for x in tensors)
    return torch.float64 if is_wide else torch.float32


def num_reals(tensor: Tensor) -> int:
    """Return the number of real numbers in a tensor: a complex number is two.

    Args:
        tensor: Tensor of a floating-point or complex type.
    """
    return tensor.numel() * (2 if tensor.is_complex() else 1)


def flattened(tensor: Tensor) -> Tensor:
    """Flatten a tensor to real numbers, with the zeros of sparse tensors, without a graph.

    Args:
        tensor: Dense or sparse tensor.
    """
    tensor = tensor.detach()
    dense = tensor.to_dense() if tensor.layout != torch.strided else tensor
    return (torch.view_as_real(dense.resolve_conj()) if dense.is_complex() else dense).flatten()


def _one_in_each_part(size: int, num: int, generator: torch.Generator) -> Tensor:
    # In float64: float32 cannot tell neighbouring coordinates apart from 2²⁴ on.
    places = torch.arange(num, dtype=torch.float64)
    places = (places + torch.rand(num, dtype=torch.float64, generator=generator)) * (size / num)
    return places.long().clamp(max=size - 1)
