"""Norms of many tensors at once, accurate for large ones too."""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK = 2**16
"""On a CPU single precision sums up so many squares to 1e-6; 25 million in one go are off by 3e-3."""


def squared_norms(tensors: list[Tensor], dtype: torch.dtype) -> Tensor:
    """Squared Euclidean norm of each tensor, of shape (number of tensors,).

    Args:
        tensors: Tensors of one device.
        dtype: Type in which to sum up and to answer; half precision would overflow at a norm of 256.

    Example:
        >>> squared_norms([torch.tensor([3.0, 4.0]), torch.ones(2, 2)], torch.float32)
        tensor([25.,  4.])
    """
    if all(tensor.device.type != "cpu" or tensor.numel() <= 4 * _BLOCK for tensor in tensors):
        norms = torch._foreach_norm(tensors, 2, dtype)
    else:
        norms = tuple(_norm_by_blocks(tensor, dtype) for tensor in tensors)
    return torch.stack(norms).square()


def _norm_by_blocks(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    flat = tensor.flatten()
    whole = flat.numel() - flat.numel() % _BLOCK
    blocks = torch.linalg.vector_norm(flat[:whole].view(-1, _BLOCK), dim=1, dtype=dtype)
    rest = torch.linalg.vector_norm(flat[whole:], dtype=dtype)
    norm: Tensor = torch.linalg.vector_norm(torch.cat([blocks, rest[None]]))
    return norm
