"""Collectives of plug-ins that are not strategies, each the identity on one rank.

Every rank must come to each of them, in the same order. Messages are tensors of numbers or of UTF-8 text: nothing that
another rank sent is unpickled.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


def gather(tensor: Tensor, num_ranks: int, group: dist.ProcessGroup | None = None) -> Tensor:
    """Gather a tensor of the same shape from every rank, stacked along a new first dimension in order of rank.

    Args:
        tensor: This rank's.
        num_ranks: Number of ranks.
        group: The ranks; all by default.
    """
    if num_ranks == 1:
        return tensor[None]
    # Not by Lightning's `all_gather`, which calls what torch has deprecated.
    # `all_gather` fills buffers as they lie in memory, whatever their strides: both sides must be contiguous.
    parts = [
        torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(num_ranks)
    ]
    dist.all_gather(parts, tensor.contiguous(), group=group)
    return torch.stack(parts)


def gather_numbers(trainer: Trainer, numbers: list[float]) -> list[list[float]]:
    """Gather as many numbers from every rank, in float64.

    Args:
        trainer: Knows the ranks and their device.
        numbers: This rank's.
    """
    return gather(_numbers(trainer, numbers), trainer.world_size).tolist()


def gather_texts(trainer: Trainer, text: str) -> list[str]:
    """Gather a text from every rank.

    Args:
        trainer: Knows the ranks and their device.
        text: This rank's, of any length.
    """
    if trainer.world_size == 1:
        return [text]
    content = text.encode()
    # Two collectives, because a gather needs equal sizes: first the longest, then the padded texts.
    (longest,) = reduce_max(trainer, [float(len(content))])
    padded = content.ljust(int(longest), b"\0")
    # `frombuffer` refuses an empty buffer, and warns about one that cannot be written to. After padding either all
    # ranks have an empty one or none has.
    mine = torch.frombuffer(bytearray(padded), dtype=torch.uint8) if padded else torch.empty(0)
    rows = gather(mine.to(trainer.strategy.root_device), trainer.world_size)
    return [bytes(row.tolist()).rstrip(b"\0").decode(errors="replace") for row in rows]


def reduce_max(trainer: Trainer, numbers: list[float]) -> list[float]:
    """Take the largest over the ranks of each number.

    Args:
        trainer: Knows the ranks and their device.
        numbers: As many on every rank.
    """
    if trainer.world_size == 1:
        return numbers
    tensor = _numbers(trainer, numbers)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor.tolist()


def reduce_sum(tensor: Tensor, num_ranks: int) -> Tensor:
    """Add up a tensor over the ranks, in place.

    Args:
        tensor: Of the same shape on every rank.
        num_ranks: Number of ranks.
    """
    if num_ranks > 1:
        dist.all_reduce(tensor)
    return tensor


def reduce_mean(tensor: Tensor, num_ranks: int) -> Tensor:
    """Average a tensor over the ranks, in place.

    Args:
        tensor: Of the same shape on every rank.
        num_ranks: Number of ranks.
    """
    return reduce_sum(tensor, num_ranks).div_(num_ranks)


def _numbers(trainer: Trainer, numbers: list[float]) -> Tensor:
    # MPS has no float64.
    device = trainer.strategy.root_device
    dtype = torch.float32 if device.type == "mps" else torch.float64
    return torch.tensor(numbers, dtype=dtype, device=device)
