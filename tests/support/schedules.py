"""Optimizers that are stepped along with a schedule, without a model."""

from __future__ import annotations

import torch

from support.parameters import parameters


def sgd(*lrs):
    """Plain SGD with one group for each learning rate."""
    groups = [{"params": [p], "lr": lr} for p, lr in zip(parameters(), lrs, strict=False)]
    return torch.optim.SGD(groups)


def advance(scheduler, num_steps):
    """The step sizes of all groups, before the first step and after each."""
    optimizer = scheduler.optimizer
    seen = [[float(group["lr"]) for group in optimizer.param_groups]]
    for _ in range(num_steps):
        optimizer.step()
        scheduler.step()
        seen.append([float(group["lr"]) for group in optimizer.param_groups])
    return seen
