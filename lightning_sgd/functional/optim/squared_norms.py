"""Norms of many tensors at once, accurate for large ones too."""

from __future__ import annotations

from itertools import chain

import torch
from torch import Tensor

from lightning_sgd.functional.optim.small_tensors import small_by_shape

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
    if tensors[0].device.type != "cpu":
        return torch.stack(torch._foreach_norm(tensors, 2, dtype)).square()
    portions, others = small_by_shape(tensors)
    places = [*chain.from_iterable(portions), *others]
    norms = [_norms_of_rows([tensors[i] for i in portion], dtype) for portion in portions]
    if others:
        norms.append(torch.stack([_norm(tensors[i], dtype) for i in others]))
    squares = (torch.cat(norms) if len(norms) > 1 else norms[0]).square()
    return (
        squares if places == list(range(len(places))) else squares[torch.tensor(places).argsort()]
    )


def _norms_of_rows(tensors: list[Tensor], dtype: torch.dtype) -> Tensor:
    rows = torch.stack(tensors).view(len(tensors), -1)
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1, dtype=dtype)
    return norms


def _norm(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if tensor.numel() > 4 * _BLOCK:
        return _norm_by_blocks(tensor, dtype)
    norm: Tensor = torch.linalg.vector_norm(tensor, dtype=dtype)
    return norm


def _norm_by_blocks(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    flat = tensor.flatten()
    whole = flat.numel() - flat.numel() % _BLOCK
    blocks = torch.linalg.vector_norm(flat[:whole].view(-1, _BLOCK), dim=1, dtype=dtype)
    rest = torch.linalg.vector_norm(flat[whole:], dtype=dtype)
    norm: Tensor = torch.linalg.vector_norm(torch.cat([blocks, rest[None]]))
    return norm
