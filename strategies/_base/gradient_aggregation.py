"""The base of strategies that combine the gradients of workers by another rule than their mean."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from lightning_sgd._validation import expect, expect_one_of
from lightning_sgd.strategies._base import checkpoint_format as checkpoints
from lightning_sgd.strategies._base.agreement import agree_on_weights
from lightning_sgd.strategies._base.common_model import AgreedBuffers, BufferRule
from lightning_sgd.strategies._base.replica import GradientReplica, Replica
from lightning_sgd.strategies._base.unwrapped import InitialWeights, StartMethod, UnwrappedStrategy
from lightning_sgd.strategies._comm.all_to_all import AllToAll
from lightning_sgd.strategies._comm.collectives import Collectives

if TYPE_CHECKING:
    from datetime import timedelta

Workers: TypeAlias = Literal["rank", "micro_batch", "both"]


class GradientAggregationStrategy(UnwrappedStrategy, ABC):
    """Trains equal replicas on a combination of the gradients of all workers.

    The module is not wrapped, because DDP averages gradients before they can be compared. Once per optimizer step,
    after the closure and before the precision plugin unscales and clips, every rank sends the i-th shard of its
    gradient to rank i, which combines the shards that it receives and sends the result to all: as many bytes as a ring
    all-reduce. A subclass says how a shard is combined (:meth:`aggregate`).

    With micro-batches as workers, each of the ``accumulate_grad_batches`` gradients is a row of its own.

    Args:
        workers: Whose gradients are combined.
        buffers: How floating-point buffers are combined for evaluation and checkpoints.
        initial_weights: ``broadcast`` those of rank 0, or ``verify`` that all ranks have the same.
        sigterm_every_n_batches: How often all ranks agree whether to stop on SIGTERM; 0 for never.
        process_group_backend: As of ``DDPStrategy``.
        timeout: How long a rank waits for the others before it gives up.
        start_method: How processes are started on one machine.
    """

    exchange: AllToAll | None
    common_model: AgreedBuffers | None

    exchanged = "gradients"

    against_sync_batchnorm = (
        "It mixes activations of all ranks before gradients are compared; use GroupNorm."
    )

    def __init__(
        self,
        *,
        workers: Workers,
        buffers: BufferRule,
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
        expect_one_of(workers, Workers, "workers", "The default is 'rank'.")
        expect_one_of(buffers, BufferRule, "buffers", "The default is 'median'.")
        self.workers, self.buffer_rule = workers, buffers
        self._replicas: list[GradientReplica] = []
        self._num_skipped, self._num_backwards = 0, 0

    # Hooks of a subclass.

    @abstractmethod
    def aggregate(
        self, replica: GradientReplica, columns: Tensor, absent: list[int]
    ) -> Tensor | None:
        """Combine the rows of all workers in this rank's shard of the columns.

        Args:
            replica: Parameters of one optimizer.
            columns: Tensor of shape (N, s) for N workers, rank by rank, without the factor of a GradScaler.
            absent: For each rank, the number of its rows that are no gradients; these are NaN.

        Returns:
            Tensor of shape (s,), or ``None`` on all ranks if no step can be taken.
        """

    def prepare(self, replica: GradientReplica, rows: Tensor) -> Tensor:
        """Return what this rank sends instead of its gradients, of shape (k, n⌈d/n⌉) for k workers on this rank."""
        return rows

    def inspect(self, replica: GradientReplica, rows: Tensor, result: Tensor) -> Tensor:
        """Check, and return, the combination of all shards.

        Args:
            replica: Parameters of one optimizer.
            rows: What this rank sent.
            result: Tensor of shape (n⌈d/n⌉,).
        """
        return result

    @property
    def min_users(self) -> int:
        """Number of ranks that must have a gradient of a parameter for it to get one."""
        return 1

    @property
    def is_identity_on_one_rank(self) -> bool:
        """Whether the gradient of a single worker is left as it is."""
        return True

    # Set-up.

    def make_exchange(self) -> AllToAll:
        """Create the collectives, with direct messages between all ranks."""
        return AllToAll(self._timeout)

    def setup_distributed(self) -> None:
        """Create the process group; a single process needs none."""
        if self.num_nodes * self.num_processes > 1:
            super().setup_distributed()
        else:
            self.set_world_ranks()

    def setup(self, trainer: Trainer) -> None:
        """Prepare the training; a single process evaluates without a process group."""
        if self.world_size == 1 and trainer.state.fn != TrainerFn.FITTING:
            Strategy.setup(self, trainer)
        else:
            super().setup(trainer)

    def _setup_model(self, model: torch.nn.Module) -> torch.nn.Module:  # type: ignore[override]  # never wrapped
        return model

    def begin(self) -> None:
        """Create the replicas."""
        is_split = self.workers == "micro_batch" and self.exchange is not None
        remedy = (
            "Micro-batches alone are workers on one device only; with several ranks use 'both'."
        )
        expect(not is_split, "workers", "'rank' or 'both'", self.workers, remedy)
        manual = self.workers != "rank" and not self._module.automatic_optimization
        remedy = "With manual optimization nobody knows which backward passes are one micro-batch."
        expect(not manual, "workers", "'rank'", self.workers, remedy)
        names = {id(param): name for name, param in self._module.named_parameters()}
        self._replicas = [
            GradientReplica(index, optimizer, self.num_ranks, names)
            for index, optimizer in enumerate(self.optimizers)
        ]
        self._num_skipped, self._num_backwards = 0, 0
        super().begin()

    def make_common_model(self) -> AgreedBuffers:
        """Create the buffers on which all ranks agree; weights are equal anyway."""
        return AgreedBuffers(
            self.exchange, self._named_buffers(), self.buffer_rule, lambda: self._num_steps
        )

    def _named_buffers(self) -> dict[str, Tensor]:
        return dict(self._module.named_buffers())

    @property
    def replicas(self) -> list[GradientReplica]:
        """What this rank trains, one per optimizer; empty outside of training."""
        return self._replicas

    # Training.

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Return the loss, or a constant if there is none, so that this rank steps together with the others."""
        output = super().training_step(*args, **kwargs)
        is_alone = self.exchange is None and self.workers == "rank"
        if output is not None or is_alone or not self._module.automatic_optimization:
            return output
        self._num_skipped += 1
        return torch.zeros((), device=self.root_device, requires_grad=True)

    def post_backward(self, closure_loss: Tensor) -> None:
        """With micro-batches as workers, move the gradient of this one into a row of its own."""
        super().post_backward(closure_loss)
        self._num_backwards += 1
        if self.workers == "rank":
            return
        (replica,) = self._replicas
        replica.pack(self._accumulation / self._loss_scale(), absent=self._num_skipped > 0)
        self._num_skipped = 0
        for tensor in replica.tensors:
            tensor.grad = None

    @property
    def _accumulation(self) -> int:
        """The number by which Lightning divides the loss."""
        return self._trainer.accumulate_grad_batches

    @torch.no_grad()
    def before_step(self, replica: Replica) -> None:
        """Combine the gradients after the closure, and before the precision plugin unscales and clips them."""
        replica = self._replicas[replica.index]
        if self.workers == "rank":
            is_absent = 0 < self._num_backwards == self._num_skipped
            self._num_skipped, self._num_backwards = 0, 0
            if self.exchange is None and self.is_identity_on_one_rank:
                return
            replica.pack(1 / self._loss_scale(), absent=is_absent)
        rows = self.prepare(replica, replica.gradients.rows[: replica.gradients.num_packed])
        self._unpack(replica, *self._combine(replica, rows))
        replica.clear()

    def after_step(self, replica: Replica) -> None:
        """Record that all ranks took the same step."""
        replica.share()

    def _combine(self, replica: GradientReplica, rows: Tensor) -> tuple[Tensor | None, list[bool]]:
        if self.exchange is None:
            return self.aggregate(replica, rows, [replica.num_absent]), replica.gradients.used
        # Order of collectives on all ranks: shards, those of `aggregate`, masks of used parameters if they differ,
        # results, those of `inspect`.
        columns, metadata = replica.scatter(self.exchange, rows)
        shard = self.aggregate(replica, columns, [num_absent for _, num_absent in metadata])
        used = replica.used_by(self.exchange, metadata, lambda count: count >= self.min_users)
        if shard is None:
            return None, used
        return self.inspect(replica, rows, replica.gather(self.exchange, shard)), used

    def _unpack(self, replica: GradientReplica, result: Tensor | None, used: list[bool]) -> None:
        gradients = replica.gradients
        if result is None:  # infinity makes a GradScaler skip the step, on all ranks
            used = [self.has_scaler] * len(used)
            result = torch.full_like(gradients.rows[0], torch.inf)
        factor = self._loss_scale()
        if self.workers != "rank":
            # Lightning divides by the full number of micro-batches, also in an incomplete group.
            factor *= gradients.num_packed / self._accumulation
        gradients.unpack(result, used, factor)

    @property
    def has_scaler(self) -> bool:
        """Whether losses are scaled, as for float16."""
        return getattr(self.precision_plugin, "scaler", None) is not None

    def _loss_scale(self) -> float:
        return float(self.precision_plugin.scaler.get_scale()) if self.has_scaler else 1.0  # type: ignore[attr-defined]  # of MixedPrecision

    @property
    def can_exchange(self) -> bool:
        """Whether all ranks are in training together."""
        is_open = self.common_model is not None and not self.common_model.is_closed
        return self.exchange is not None and is_open and not self._has_failed

    def agree(self) -> None:
        """Compare the weights of all ranks, and give those of the majority to the others."""
        if self.can_exchange and self.exchange is not None:
            agree_on_weights(self.exchange, self._module, self.optimizers, self._num_steps)

    def on_validation_start(self) -> None:
        """Validate the same weights and buffers on all ranks."""
        self.agree()
        super().on_validation_start()

    def finalize(self) -> None:
        """Leave the same weights and buffers on every rank."""
        self.agree()
        super().finalize()

    # Checkpoints.

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return weights and agreed buffers; all ranks must call this together."""
        state = super().lightning_module_state_dict()
        if self.can_exchange and self.common_model is not None:
            self.agree()
            with self.common_model.swapped_in():
                state = self._with_copies_of_buffers(super().lightning_module_state_dict())
        self._written = state
        return state

    def _with_copies_of_buffers(self, state: dict[str, Any]) -> dict[str, Any]:
        names = self._named_buffers().keys() & state.keys()
        return {**state, **{name: state[name].detach().clone() for name in names}}

    def rank_state(self, checkpoint: checkpoints.Checkpoint) -> checkpoints.Checkpoint:
        """Return this rank's buffers and all else but weights and optimizer states, which are equal on all ranks."""
        assert self.common_model is not None
        with self.common_model.own():
            own = checkpoints.copied(self.common_model.buffers)
        mine = checkpoints.with_own_weights(checkpoint, self._written, own)
        return checkpoints.without_common(mine, self._module.state_dict().keys(), own.keys())

    def average_over_ranks(
        self, state: Mapping[str, Any], exchange: Collectives
    ) -> Mapping[str, Any]:
        """Replace the buffers of a state dictionary by agreed ones; weights are equal on all ranks."""
        common = self.common_model
        names = [] if common is None else [name for name in common.buffers if name in state]
        if common is None or not names:
            return state
        agreed = common.agree([state[name] for name in names])
        return {**state, **dict(zip(names, agreed, strict=True))}
