"""Rows of all ranks in one table."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def gather(rows: Tensor, num_ranks: int) -> Tensor:
    """The rows of all ranks, in the order of their batches; a collective if there are several.

    Args:
        rows: As many on every rank.
        num_ranks: Number of ranks.
    """
    if num_ranks == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(num_ranks)]
    dist.all_gather(parts, rows)
    return torch.stack(parts, dim=1).flatten(0, 1)
