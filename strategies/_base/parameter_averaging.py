"""The base of strategies in which every rank trains a model of its own and the models are averaged now and then."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_sgd._validation import expect
from lightning_sgd.functional.distributed.flat_buffers import FlatBuffers
from lightning_sgd.strategies._base import checkpoint_format as checkpoints
from lightning_sgd.strategies._base.common_model import (
    BufferPolicy,
    Consensus,
    OptimizerStatePolicy,
)
from lightning_sgd.strategies._base.replica import Replica
from lightning_sgd.strategies._base.unwrapped import InitialWeights, StartMethod, UnwrappedStrategy
from lightning_sgd.strategies._comm.collectives import Collectives, Purpose

if TYPE_CHECKING:
    from datetime import timedelta

__all__ = ["InitialWeights", "ParameterAveragingStrategy", "StartMethod"]


class ParameterAveragingStrategy(UnwrappedStrategy, ABC):
    """Trains one model per rank, without a wrapper and without reducing gradients.

    A subclass says what happens after an optimizer step (:meth:`after_step`), mostly by calling :meth:`average`, and
    whatever else it needs of the hooks below. This class owns what its base does not: the mean of the models for
    validation, checkpoints and the end of training, with every rank's own weights put back after; buffers; optimizer
    state; and what each rank needs to resume.

    Args:
        buffers: What becomes of floating-point buffers when models are averaged.
        optimizer_state: What becomes of each rank's optimizer state in a round.
        initial_weights: Whether to ``broadcast`` those of rank 0 or to ``verify`` that all ranks have the same.
        sigterm_every_n_batches: How often all ranks agree whether to stop on SIGTERM; 0 for never.
        process_group_backend: As of ``DDPStrategy``.
        timeout: How long a rank waits for the others before it gives up.
        start_method: How processes are started on one machine.
    """

    against_sync_batchnorm = (
        "Ranks are not in the same forward pass; `buffers='average'` averages the statistics."
    )

    def __init__(
        self,
        buffers: BufferPolicy,
        optimizer_state: OptimizerStatePolicy,
        initial_weights: InitialWeights,
        sigterm_every_n_batches: int,
        process_group_backend: str | None,
        timeout: timedelta,
        start_method: StartMethod,
    ) -> None:
        super().__init__(
            initial_weights, sigterm_every_n_batches, process_group_backend, timeout, start_method
        )
        self.buffer_policy, self.state_policy = buffers, optimizer_state
        self.consensus: Consensus | None = None

    # What a subclass says.

    @abstractmethod
    def describe(self) -> str:
        """When models are averaged, as the middle of the line at the start."""

    def candidate(self, replica: Replica) -> Sequence[Tensor] | None:
        """This rank's model as it enters the mean for evaluation; ``None`` for the parameters as they are.

        Args:
            replica: What one optimizer trains.
        """
        return None

    # What a subclass uses.

    @property
    def replicas(self) -> list[Replica]:
        """What this rank trains, one by optimizer; none outside of training."""
        return [] if self.consensus is None else self.consensus.replicas

    def average(self, replica: Replica, *, measure: bool = False) -> Tensor | None:
        """Give all ranks the mean of their weights, and treat buffers and optimizer state as the settings say.

        Args:
            replica: What one optimizer trains.
            measure: Whether to return how far this rank was from the mean.
        """
        assert self.consensus is not None
        return self.consensus.round(replica, measure=measure)

    # Set-up.

    def begin(self) -> None:
        """Make the replicas of what the optimizers train."""
        self.consensus = Consensus(
            self.exchange,
            self.optimizers,
            [buffer for buffer in self._module.buffers() if buffer.is_floating_point()],
            self.candidate,
            self.buffer_policy,
            self.state_policy,
        )
        super().begin()

    # Training.

    def go_apart(self) -> None:
        """From now on weights and buffers may differ."""
        if self.consensus is not None:
            self.consensus.move_buffers()

    def settle(self) -> None:
        """Leave the mean of the models on every rank, for good."""
        if self.consensus is not None:
            self.consensus.settle()

    def close(self) -> None:
        """Put this rank's weights back, and exchange nothing any more."""
        if self.consensus is not None:
            self.consensus.close()

    def on_validation_start(self) -> None:
        """Evaluate the mean of the models."""
        if self.consensus is not None:
            self.consensus.enter()

    def on_validation_end(self) -> None:
        """Go on with this rank's own weights."""
        if self.consensus is not None:
            self.consensus.leave()

    def teardown(self) -> None:
        """Free the buffers."""
        if self.consensus is not None:
            self.consensus.release()
        super().teardown()

    # Checkpoints.

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The mean of the models; exchanges, so every rank must come here."""
        self._written = self._mean_state_dict()
        return self._written

    def _mean_state_dict(self) -> dict[str, Any]:
        if self.consensus is None or self._has_failed or not self.consensus.is_apart:
            return super().lightning_module_state_dict()
        with self.consensus.mean():
            return checkpoints.copied(super().lightning_module_state_dict())

    def own_part(self, checkpoint: checkpoints.Checkpoint) -> checkpoints.Checkpoint:
        """Everything, with this rank's weights wherever the mean of the models is."""
        assert self.consensus is not None
        with self.consensus.own():
            own = checkpoints.copied(super().lightning_module_state_dict())
        return checkpoints.with_own_weights(checkpoint, self._written, own)

    def in_common(self, state: Mapping[str, Any], exchange: Collectives) -> Mapping[str, Any]:
        """The mean."""
        return checkpoints.mean_over_ranks(state, exchange, self._num_steps)

    def start_alike(self) -> None:
        """Every rank starts from the mean."""
        for replica in self.replicas:
            replica.share()


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
