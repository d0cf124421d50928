"""Exchanging gradients instead of models, as DDP does, while a training warms up."""

from __future__ import annotations

import torch

from lightning_sgd._validation import expect
from lightning_sgd.functional.distributed.flat_buffers import FlatBuffers
from lightning_sgd.strategies._base.replica import Replica
from lightning_sgd.strategies._comm.collectives import Collectives, Purpose


def describe_warm_up(num_steps: int) -> str:
    """How the line at the start begins.

    Args:
        num_steps: Of the warm-up.

    Example:
        >>> describe_warm_up(5) + "averaged", describe_warm_up(0)
        ('exchanged as gradients for 5 steps, then averaged', '')
    """
    return f"exchanged as gradients for {num_steps} steps, then " if num_steps else ""


@torch.no_grad()
def average_gradients(exchange: Collectives, replica: Replica) -> None:
    """Give all ranks the mean of their gradients, zero where one has none; where none has one, nobody gets one.

    Args:
        exchange: Between the ranks.
        replica: What the gradients are of.
    """
    params = replica.tensors
    remedy = "Set sparse=False in the embedding, or warmup_steps=0."
    dense = not any(p.grad is not None and p.grad.is_sparse for p in params)
    expect(dense, "gradients", "dense during the warm-up", "a sparse one", remedy)
    used = torch.tensor([float(p.grad is not None) for p in params], device=params[0].device)
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
    flat = FlatBuffers([*gradients, used])
    flat.pack()
    exchange.mean(flat, Purpose.GRADIENTS, replica.num_steps)
    flat.unpack()
    for param, gradient, share in zip(params, gradients, used.tolist(), strict=True):
        param.grad = gradient if share else None
