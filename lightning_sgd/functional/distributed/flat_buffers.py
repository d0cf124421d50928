"""Many tensors as a few long ones, so that an exchange is a few messages instead of hundreds."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

HEADER = 2
"""Elements at the front of each buffer that a message can carry beside the tensors."""


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type to add in: averages of bfloat16 or float16 models would stall at their resolution.

    Example:
        >>> accumulation_dtype(torch.bfloat16), accumulation_dtype(torch.float64)
        (torch.float32, torch.float64)
    """
    return torch.promote_types(dtype, torch.float32)


class FlatBuffers:
    """One contiguous buffer per device and type, with a place in it for each of the tensors.

    Tensors of 16 bits have their places in a buffer of 32 bits. A tensor that occurs twice (tied weights) has one
    place. The tensors keep their own storage: :meth:`pack` and :meth:`unpack` copy.

    Args:
        tensors: Real or complex floating-point tensors, of any shapes and strides.
        exact: Buffers of float64 for float32 tensors: the mean of equal numbers is then that number, to the last bit.

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
        """Size of all buffers."""
        return sum(buffer.nbytes for buffer in self.buffers)

    def holds(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these are the very tensors that have a place here.

        Args:
            tensors: As for the constructor.
        """
        mine, theirs = map(id, self.tensors), map(id, unique(tensors))
        return list(mine) == list(theirs)

    def pack(self, source: Sequence[Tensor] | None = None) -> None:
        """Copy into the buffers.

        Args:
            source: Tensors to copy instead of those given to the constructor, of the same shapes.
        """
        _copy(self.views, self.tensors if source is None else source)

    def unpack(self) -> None:
        """Copy from the buffers into the tensors."""
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
    """Euclidean distance between two models, one number on their device.

    Args:
        tensors: One model.
        others: The other, in the same order; may be longer.

    Example:
        >>> distance([torch.zeros(2), torch.zeros(1)], [torch.tensor([2.0, 3.0]), torch.tensor([6.0])])
        tensor(7.)
    """
    pairs = zip(tensors, others, strict=False)
    norms = [torch.linalg.vector_norm(real(x) - real(y)) for x, y in pairs]
    total: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return total


def unique(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Each tensor once, in the order of first occurrence.

    Args:
        tensors: May hold the same tensor more than once.
    """
    return list({id(tensor): tensor for tensor in tensors}.values())


def real(tensor: Tensor) -> Tensor:
    """The tensor, or real and imaginary parts of a complex one, without a copy.

    Args:
        tensor: Of any type.
    """
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


@torch.no_grad()
def _copy(into: Sequence[Tensor], source: Sequence[Tensor]) -> None:
    if into:
        torch._foreach_copy_([real(x) for x in into], [real(x) for x in source])


def consensus_distance(squared: Sequence[float]) -> float:
    r"""Root mean square distance of n models from their mean, :math:`\sqrt{\frac1n \sum_i \|x_i - \bar x\|^2}`.

    Args:
        squared: By rank, the squared distance of its model from the mean.

    Example:
        >>> consensus_distance([9.0, 9.0])
        3.0
    """
    return math.sqrt(sum(squared) / len(squared))
