"""Pack many tensors into a few flat buffers, so that an exchange takes a few messages instead of hundreds."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

HEADER = 2
"""Elements at the front of each buffer for the tag of a message."""


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the type to add in, at least float32: averages in bfloat16 or float16 would stall at their resolution.

    Example:
        >>> accumulation_dtype(torch.bfloat16), accumulation_dtype(torch.float64)
        (torch.float32, torch.float64)
    """
    return torch.promote_types(dtype, torch.float32)


class FlatBuffers:
    """One contiguous buffer per device and type, in which each tensor has a place.

    Tensors of 16 bits have their places in a buffer of 32 bits. Duplicates (tied weights) share one place. The tensors
    keep their own storage: :meth:`pack` and :meth:`unpack` copy.

    Args:
        tensors: Real or complex floating-point tensors, of any shapes and strides.
        exact: Use float64 buffers, in which the mean of equal float32 numbers is that number, to the last bit.

    Example:
        >>> weight, bias = torch.ones(2, 2), torch.zeros(2)
        >>> flat = FlatBuffers([weight, bias])
        >>> flat.pack()
        >>> flat.buffers[0] /= 2
        >>> flat.unpack()
        >>> weight
        tensor([[0.5000, 0.5000],
                [0.5000, 0.5000]])
    """

    def __init__(self, tensors: Sequence[Tensor], *, exact: bool = False) -> None:
        self.tensors = unique(tensors)
        self._exact = exact
        self._keys = [self._key(tensor) for tensor in map(real, self.tensors)]
        # In order of first occurrence, which is that of the parameters and so the same on all ranks: buffers need no
        # names.
        sizes = dict.fromkeys(self._keys, HEADER)
        for key, tensor in zip(self._keys, map(real, self.tensors), strict=True):
            sizes[key] += tensor.numel()
        flat = {
            (device, dtype): torch.zeros(size, device=device, dtype=dtype)
            for (device, dtype), size in sizes.items()
        }
        self.buffers = list(flat.values())
        self.views = self._carve(flat)

    @property
    def num_bytes(self) -> int:
        """Size of all buffers, in bytes."""
        return sum(buffer.nbytes for buffer in self.buffers)

    def holds(self, tensors: Sequence[Tensor]) -> bool:
        """Tell whether these are the same tensor objects, in the same order."""
        mine, theirs = map(id, self.tensors), map(id, unique(tensors))
        return list(mine) == list(theirs)

    def pack(self, source: Sequence[Tensor] | None = None) -> None:
        """Copy the tensors, or others of the same shapes (``source``), into the buffers."""
        _copy(self.views, self.tensors if source is None else source)

    def unpack(self) -> None:
        """Copy the buffers into the tensors."""
        _copy(self.tensors, self.views)

    def _key(self, tensor: Tensor) -> tuple[torch.device, torch.dtype]:
        dtype = torch.float64 if self._exact else accumulation_dtype(tensor.dtype)
        return tensor.device, dtype

    def _carve(self, flat: dict[tuple[torch.device, torch.dtype], Tensor]) -> list[Tensor]:
        offsets, views = dict.fromkeys(flat, HEADER), []
        for key, tensor in zip(self._keys, map(real, self.tensors), strict=True):
            begin = offsets[key]
            offsets[key] = begin + tensor.numel()
            views.append(flat[key][begin : offsets[key]].view(tensor.shape))
        return views


@torch.no_grad()
def distance(tensors: Sequence[Tensor], others: Sequence[Tensor]) -> Tensor:
    """Return the Euclidean distance between two models, a scalar on their device.

    Args:
        tensors: Parameters of one model.
        others: Parameters of the other, in the same order; further ones are ignored.

    Example:
        >>> distance([torch.zeros(2), torch.zeros(1)], [torch.tensor([2.0, 3.0]), torch.tensor([6.0])])
        tensor(7.)
    """
    pairs = zip(tensors, others, strict=False)
    # A norm of norms: the difference of two whole models is never in memory at once.
    norms = [torch.linalg.vector_norm(real(x) - real(y)) for x, y in pairs]
    total: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return total


def unique(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Remove duplicates by identity, and keep the order of first occurrence."""
    return list({id(tensor): tensor for tensor in tensors}.values())


def real(tensor: Tensor) -> Tensor:
    """View a complex tensor as its real and imaginary parts; return others as they are."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


@torch.no_grad()
def _copy(into: Sequence[Tensor], source: Sequence[Tensor]) -> None:
    if into:
        torch._foreach_copy_([real(x) for x in into], [real(x) for x in source])


def consensus_distance(squared: Sequence[float]) -> float:
    r"""Return the RMS distance of n models from their mean, :math:`\sqrt{\frac1n \sum_i \|x_i - \bar x\|^2}`.

    Args:
        squared: For each rank the squared distance of its model from the mean.

    Example:
        >>> consensus_distance([9.0, 9.0])
        3.0
    """
    return math.sqrt(sum(squared) / len(squared))
