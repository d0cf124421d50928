"""Where the numbers of the traffic of a strategy come from."""

from __future__ import annotations

import math
from typing import Protocol

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch.nn.parallel import DistributedDataParallel

from lightning_sgd.functional.distributed.traffic import (
    Traffic,
    all_reduce_traffic,
    broadcast_traffic,
)


class TrafficSource(Protocol):
    """Counts what this rank sends, as well as that can be done.

    Attributes:
        description: What is known and what is not, for the line at the start.
    """

    description: str

    def read(self) -> Traffic:
        """What was sent so far; NaN for what cannot be known. Steps are left to the caller."""

    def after_backward(self) -> None:
        """Take note that a backward pass has ended."""


class CountedTraffic:
    """What a strategy has counted itself.

    Args:
        owner: Its ``traffic`` is read.
    """

    description = "bytes, messages and blocked time as the strategy counts them"

    def __init__(self, owner: object) -> None:
        self.owner = owner

    def read(self) -> Traffic:
        """A copy."""
        traffic = self.owner.traffic  # type: ignore[attr-defined]  # found by `find_source`
        return Traffic(traffic.num_bytes, traffic.num_messages, traffic.seconds)

    def after_backward(self) -> None:
        """The strategy counts."""


class ReducedGradients:
    """What DDP sends: every trainable gradient in every backward pass that synchronises, and the buffers before it.

    The reducer is compiled code that tells nobody what it does, except a communication hook, and a hook may change
    how sums are rounded. But the wrapper says in public whether a backward pass synchronises.

    Args:
        wrapper: The module as DDP trains it.
        num_ranks: Number of ranks.
    """

    description = (
        "bytes of gradients and buffers in the backward passes that DDP synchronises (without a communication hook); "
        "messages and blocked time are not known, because DDP tells nobody"
    )

    def __init__(self, wrapper: DistributedDataParallel, num_ranks: int) -> None:
        self.wrapper, self.num_ranks = wrapper, num_ranks
        self.num_bytes = 0.0

    def read(self) -> Traffic:
        """Bytes alone."""
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
    """Nothing at all, or nothing that can be known.

    Args:
        value: Zero or NaN.
        description: Says which, and why.
    """

    def __init__(self, value: float, description: str) -> None:
        self.value, self.description = value, description

    def read(self) -> Traffic:
        """The same every time."""
        return Traffic(self.value, self.value, self.value)

    def after_backward(self) -> None:
        """Nothing to count."""


def find_source(trainer: Trainer) -> TrafficSource:
    """The best source for the strategy of this training.

    Args:
        trainer: Set up.
    """
    strategy = trainer.strategy
    if trainer.world_size == 1:
        return FixedTraffic(0.0, "1 rank, nothing to exchange")
    exchange = getattr(strategy, "exchange", None)
    if isinstance(getattr(exchange, "traffic", None), Traffic):
        return CountedTraffic(exchange)
    if isinstance(strategy.model, DistributedDataParallel):
        return ReducedGradients(strategy.model, trainer.world_size)
    return FixedTraffic(
        math.nan, f"what {type(strategy).__name__} sends cannot be known without its private parts"
    )


def holds_whole_model(trainer: Trainer) -> bool:
    """Whether every rank has all parameters, so that models can be compared.

    Args:
        trainer: Set up.
    """
    return trainer.world_size == 1 or isinstance(trainer.strategy, DDPStrategy)
