"""Small tensors of one shape in one piece of memory: on a CPU a call per tensor takes longer than the arithmetic."""

from __future__ import annotations

import torch
from torch import Tensor

SMALL = 2**12
"""Largest number of elements at which copying pays; from 6000 on, single calls were as fast."""
_PORTION = 2**18
"""Number of elements that are copied at a time; they stay in the second-level cache."""


def small_by_shape(tensors: list[Tensor]) -> tuple[list[list[int]], list[int]]:
    """Which tensors are worth copying together, and which are not.

    The answer depends on shapes and strides alone, so a resumed run rounds as the first one did.

    Args:
        tensors: Tensors of one device and dtype.

    Returns:
        Places of small contiguous tensors, in portions of equal shape, and the places of all others.

    Example:
        >>> small_by_shape([torch.zeros(shape) for shape in (3, (2, 5000), 3, 4)])
        ([[0, 2]], [1, 3])
    """
    by_shape: dict[torch.Size, list[int]] = {}
    others = []
    for place, tensor in enumerate(tensors):
        if 0 < tensor.numel() <= SMALL and tensor.is_contiguous():
            by_shape.setdefault(tensor.shape, []).append(place)
        else:
            others.append(place)
    portions = []
    for shape, places in by_shape.items():
        if len(places) == 1:
            others += places
        else:
            num = _PORTION // shape.numel()
            portions += [places[i : i + num] for i in range(0, len(places), num)]
    return portions, sorted(others)


def stack_scaled(tensors: list[Tensor], factors: Tensor) -> list[Tensor]:
    """Copies of tensors of one shape, each multiplied by a factor.

    Args:
        tensors: Tensors of one shape, device and dtype.
        factors: One for each, of the same dtype.

    Example:
        >>> stack_scaled([torch.ones(2), torch.ones(2)], torch.tensor([3.0, 4.0]))
        [tensor([3., 3.]), tensor([4., 4.])]
    """
    copies = torch.stack(tensors)
    copies.view(len(tensors), -1).mul_(factors[:, None])
    return list(copies.unbind())
