"""Small trainings with ByzantineStrategy, the same in plain loops, and one gradient on real processes."""

from __future__ import annotations

import warnings
from datetime import timedelta

import torch
from lightning.pytorch import Callback
from torch.nn.utils import parameters_to_vector

import lightning_sgd
from lightning_sgd.strategies._base.replica import GradientReplica
from lightning_sgd.strategies._comm.all_to_all import AllToAll
from support.strategy_training import (
    FORK,
    GLOBAL_BATCH,
    NUM_BATCHES,
    flat,
    samples,
    sgd,
    spread,
)
from support.training import loss_of, network


def byzantine(*args, **settings):
    return lightning_sgd.ByzantineStrategy(*args, **{**FORK, **settings})


def finals(run):
    return [record["final"] for record in run.ranks]


def simulate(num_ranks, combine, epochs=2):
    """Weights after every step in plain PyTorch and double precision; ``combine(gradients)`` is used by SGD."""
    net = network().double()
    optimizer, trace = sgd(net.parameters()), []
    x, y = (tensor.double() for tensor in samples().tensors)
    for step in range(epochs * NUM_BATCHES):
        begin, gradients = step % NUM_BATCHES * GLOBAL_BATCH, []
        for rank in range(num_ranks):
            mine = slice(begin + rank, begin + GLOBAL_BATCH, num_ranks)
            loss = loss_of(net, (x[mine], y[mine]))
            gradients.append(
                parameters_to_vector(torch.autograd.grad(loss, list(net.parameters())))
            )
        combined, position = combine(torch.stack(gradients)), 0
        for param in net.parameters():
            param.grad = combined[position : position + param.numel()].view_as(param)
            position += param.numel()
        optimizer.step()
        trace.append(flat(net))
    return trace


def assert_follows(run, expected):
    for weights, exact in zip(run.trace, expected, strict=True):
        assert spread(weights) == 0.0
        torch.testing.assert_close(weights[0].double(), exact, rtol=1e-5, atol=1e-6)


class Silent(Callback):
    """Lets a warning be a warning in the forked processes."""

    def __init__(self, *messages):
        for message in messages:
            warnings.filterwarnings("ignore", message)


class SaveEvery(Callback):
    """Writes a checkpoint after every step."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_batch_end(self, trainer, *_):
        trainer.save_checkpoint(f"{self.folder}/{trainer.global_step}.ckpt")


def exchange():
    return AllToAll(timedelta(seconds=20))


def row(rank, d, dtype=torch.float32):
    """Honest workers agree on most of it; the last one is far off."""
    generator = torch.Generator().manual_seed(rank)
    return (5.0 + torch.randn(d, generator=generator, dtype=torch.float64)).to(dtype)


def replica(gradient, num_ranks):
    param = torch.zeros_like(gradient, requires_grad=True)
    param.grad = gradient
    made = GradientReplica(0, torch.optim.SGD([param], lr=0.1), num_ranks, {})
    made.pack(1.0, absent=False)
    return made
