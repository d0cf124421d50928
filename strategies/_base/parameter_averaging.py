"""The base of strategies in which every rank trains its own model and models are averaged from time to time."""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_sgd._validation import Words, expect, expect_one_of
from lightning_sgd.functional.distributed.flat_buffers import FlatBuffers
from lightning_sgd.strategies._base import checkpoint_format as checkpoints
from lightning_sgd.strategies._base.common_model import (
    BufferPolicy,
    MeanModel,
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

    A subclass says what happens after an optimizer step (:meth:`after_step`), mostly by calling :meth:`average`. This
    class owns the mean of the models, with buffers and optimizer state, and what each rank needs to resume.

    Args:
        buffers: What happens to floating-point buffers when models are averaged.
        optimizer_state: What happens to each rank's optimizer state in a round.
        initial_weights: ``broadcast`` those of rank 0, or ``verify`` that all ranks have the same.
        sigterm_every_n_batches: How often all ranks agree whether to stop on SIGTERM; 0 for never.
        process_group_backend: As of ``DDPStrategy``.
        timeout: How long a rank waits for the others before it gives up.
        start_method: How processes are started on one machine.
    """

    common_model: MeanModel | None

    against_sync_batchnorm = (
        "Ranks are not in the same forward pass; `buffers='average'` averages the statistics."
    )

    def __init__(
        self,
        *,
        buffers: BufferPolicy,
        optimizer_state: OptimizerStatePolicy,
        initial_weights: InitialWeights,
        sigterm_every_n_batches: int,
        process_group_backend: str | None,
        timeout: timedelta,
        start_method: StartMethod,
    ) -> None:
        super().__init__(
            initial_weights=initial_weights,
            sigterm_every_n_batches=sigterm_every_n_batches,
            process_group_backend=process_group_backend,
            timeout=timeout,
            start_method=start_method,
        )
        expect_one_of(buffers, BufferPolicy, "buffers", "The default is 'average'.")
        remedy = "The default is 'keep'."
        expect_one_of(optimizer_state, OptimizerStatePolicy, "optimizer_state", remedy)
        self.buffer_policy, self.state_policy = buffers, optimizer_state

    def model_to_average(self, replica: Replica) -> Sequence[Tensor] | None:
        """Return this rank's model as it enters the common model; ``None`` for the parameters themselves."""
        return None

    @property
    def replicas(self) -> list[Replica]:
        """What this rank trains, one per optimizer; empty outside of training."""
        return [] if self.common_model is None else self.common_model.replicas

    def average(self, replica: Replica, *, measure: bool = False) -> Tensor | None:
        """Continue on all ranks from the mean of their weights.

        Args:
            replica: Parameters of one optimizer.
            measure: Whether to return the distance of this rank's weights from the mean.
        """
        assert self.common_model is not None
        return self.common_model.average(replica, measure=measure)

    def make_common_model(self) -> MeanModel:
        """Create the mean of the models, and with it the replicas."""
        return MeanModel(
            self.exchange,
            self.optimizers,
            [p for p in self._module.parameters() if p.is_floating_point() or p.is_complex()],
            [buffer for buffer in self._module.buffers() if buffer.is_floating_point()],
            self.model_to_average,
            self.buffer_policy,
            self.state_policy,
        )

    # Checkpoints.

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the mean of the models; all ranks must call this together."""
        self._written = self._mean_state_dict()
        return self._written

    def _mean_state_dict(self) -> dict[str, Any]:
        if self.common_model is None or self._has_failed or not self.common_model.is_diverged:
            return super().lightning_module_state_dict()
        with self.common_model.swapped_in():
            return checkpoints.copied(super().lightning_module_state_dict())

    def rank_state(self, checkpoint: checkpoints.Checkpoint) -> checkpoints.Checkpoint:
        """Return the checkpoint with this rank's weights wherever the mean of the models is."""
        assert self.common_model is not None
        with self.common_model.own():
            own = checkpoints.copied(super().lightning_module_state_dict())
        return checkpoints.with_own_weights(checkpoint, self._written, own)

    def average_over_ranks(
        self, state: Mapping[str, Any], exchange: Collectives
    ) -> Mapping[str, Any]:
        """Average the floating-point tensors of a state dictionary over the ranks."""
        return checkpoints.mean_over_ranks(state, exchange, self._num_steps)

    def start_from_common(self) -> None:
        """Start every rank from the mean."""
        for replica in self.replicas:
            replica.share()


def describe_warm_up(num_steps: int) -> str:
    """Describe the warm-up, at the beginning of the start message.

    Example:
        >>> describe_warm_up(5) + "averaged every step", describe_warm_up(0)
        ('exchanged as gradients for 5 steps, then averaged every step', '')
    """
    return f"exchanged as gradients for {num_steps} steps, then " if num_steps else ""


@torch.no_grad()
def average_gradients(exchange: Collectives, replica: Replica) -> None:
    """Average the gradients of all ranks, as DDP does, during the warm-up.

    A missing gradient counts as zero, unless it is missing on all ranks; then it stays missing.
    """
    params = replica.tensors
    remedy = "Set sparse=False in the embedding, or warmup_steps=0."
    dense = not any(p.grad is not None and p.grad.is_sparse for p in params)
    expect(dense, "gradients", "dense during the warm-up", Words("a sparse one"), remedy)
    used = torch.tensor([float(p.grad is not None) for p in params], device=params[0].device)
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
    flat = FlatBuffers([*gradients, used])
    flat.pack()
    exchange.all_reduce_mean(flat, Purpose.GRADIENTS, replica.num_steps)
    flat.unpack()
    for param, gradient, share in zip(params, gradients, used.tolist(), strict=True):
        param.grad = gradient if share else None
