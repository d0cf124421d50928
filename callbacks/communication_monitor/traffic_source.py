"""Find out what a strategy sends: by its own counts, by DDP's wrapper, or not at all."""

from __future__ import annotations

import math
from typing import Protocol

from lightning.pytorch import Trainer
from torch.nn.parallel import DistributedDataParallel

from lightning_sgd._protocols import CountsTraffic
from lightning_sgd.functional.distributed.traffic import (
    Traffic,
    all_reduce_traffic,
    broadcast_traffic,
)


class TrafficSource(Protocol):
    """Count what this rank sends, as far as that is possible.

    Attributes:
        description: What is known and what is not, for the start message.
    """

    description: str

    def read(self) -> Traffic:
        """Return what was sent so far, without steps; NaN for what cannot be known."""

    def after_backward(self) -> None:
        """Count the exchange of a backward pass that has ended."""


class CountedTraffic:
    """Read the counts of a strategy that counts itself."""

    description = "bytes, messages and blocked time as the strategy counts them"

    def __init__(self, strategy: CountsTraffic) -> None:
        self.strategy = strategy

    def read(self) -> Traffic:
        """Return a copy."""
        traffic = self.strategy.traffic
        assert traffic is not None  # see `find_source`
        return Traffic(traffic.num_bytes, traffic.num_messages, traffic.seconds)

    def after_backward(self) -> None:
        """Do nothing: the strategy counts."""


class ReducedGradients:
    """Count what DDP sends: all trained gradients in every backward pass that synchronises, and the buffers before it.

    The reducer is compiled code that reports nothing except to a communication hook, and a hook may change how sums are
    rounded. But the wrapper says in public whether a backward pass synchronises.
    """

    description = (
        "bytes of gradients and buffers in the backward passes that DDP synchronises (without a communication hook); "
        "messages and blocked time are not known, because DDP does not report them"
    )

    def __init__(self, wrapper: DistributedDataParallel, num_ranks: int) -> None:
        self.wrapper, self.num_ranks = wrapper, num_ranks
        self.num_bytes = 0.0

    def read(self) -> Traffic:
        """Return the bytes alone."""
        return Traffic(self.num_bytes, math.nan, math.nan)

    def after_backward(self) -> None:
        """Count what this pass sent."""
        if not self.wrapper.require_backward_grad_sync:
            return
        module = self.wrapper.module
        gradients = sum(p.nbytes for p in module.parameters() if p.requires_grad)
        self.num_bytes += all_reduce_traffic(gradients, self.num_ranks)[0]
        if self.wrapper.broadcast_buffers:
            buffers = sum(buffer.nbytes for buffer in module.buffers())
            self.num_bytes += broadcast_traffic(buffers, self.num_ranks)[0]


class FixedTraffic:
    """Report zero or NaN, always."""

    def __init__(self, value: float, description: str) -> None:
        self.value, self.description = value, description

    def read(self) -> Traffic:
        """Return the same every time."""
        return Traffic(self.value, self.value, self.value)

    def after_backward(self) -> None:
        """Do nothing."""


def find_source(trainer: Trainer) -> TrafficSource:
    """Return the best source for the strategy of a training that is set up."""
    strategy = trainer.strategy
    if trainer.world_size == 1:
        return FixedTraffic(0.0, "1 rank, nothing to exchange")
    if isinstance(strategy, CountsTraffic) and isinstance(strategy.traffic, Traffic):
        return CountedTraffic(strategy)
    if isinstance(strategy.model, DistributedDataParallel):
        return ReducedGradients(strategy.model, trainer.world_size)
    return FixedTraffic(
        math.nan, f"what {type(strategy).__name__} sends cannot be known without its private parts"
    )
