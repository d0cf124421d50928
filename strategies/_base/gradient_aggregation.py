"""The base of strategies that combine the gradients of workers in another way than by their mean."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from lightning_sgd._validation import expect
from lightning_sgd.strategies._base import checkpoint_format as checkpoints
from lightning_sgd.strategies._base.agreement import agree_on_weights
from lightning_sgd.strategies._base.common_model import BufferRule, SharedBuffers
from lightning_sgd.strategies._base.replica import GradientReplica, Replica
from lightning_sgd.strategies._base.unwrapped import InitialWeights, StartMethod, UnwrappedStrategy
from lightning_sgd.strategies._comm.all_to_all import AllToAll
from lightning_sgd.strategies._comm.collectives import Collectives

if TYPE_CHECKING:
    from datetime import timedelta

Workers: TypeAlias = Literal["rank", "micro_batch", "both"]


class GradientAggregationStrategy(UnwrappedStrategy, ABC):
    """Trains equal replicas on what a subclass makes of the gradients of all workers.

    The module is not wrapped, because DDP averages before anybody can look. Once per optimizer step, after the closure
    and before the precision plugin unscales and clips, every rank sends the i-th part of its gradient to rank i, which
    combines the parts that it gets, and sends the result to all: as many bytes as a ring all-reduce. A subclass says
    how a part is combined (:meth:`aggregate`).

    With micro-batches as workers, each of the ``accumulate_grad_batches`` gradients is a row of its own.

    Args:
        workers: Whose gradients are combined.
        buffers: How floating-point buffers are combined for evaluation and checkpoints.
        initial_weights: Whether to ``broadcast`` those of rank 0 or to ``verify`` that all ranks have the same.
        sigterm_every_n_batches: How often all ranks agree whether to stop on SIGTERM; 0 for never.
        process_group_backend: As of ``DDPStrategy``.
        timeout: How long a rank waits for the others before it gives up.
        start_method: How processes are started on one machine.
    """

    exchange: AllToAll | None

    against_sync_batchnorm = (
        "It mixes activations of all ranks before gradients are compared; use GroupNorm."
    )

    def __init__(
        self,
        workers: Workers,
        buffers: BufferRule,
        initial_weights: InitialWeights,
        sigterm_every_n_batches: int,
        process_group_backend: str | None,
        timeout: timedelta,
        start_method: StartMethod,
    ) -> None:
        super().__init__(
            initial_weights, sigterm_every_n_batches, process_group_backend, timeout, start_method
        )
        choices = "rank", "micro_batch", "both"
        remedy = "The default is 'rank'."
        expect(workers in choices, "workers", f"one of {', '.join(choices)}", workers, remedy)
        rules = "median", "mean", "rank0", "local"
        remedy = "The default is 'median'."
        expect(buffers in rules, "buffers", f"one of {', '.join(rules)}", buffers, remedy)
        self.workers, self.buffer_rule = workers, buffers
        self.shared_buffers: SharedBuffers | None = None
        self._replicas: list[GradientReplica] = []
        self._num_skipped, self._num_backwards = 0, 0
        self._is_settled = True

    # What a subclass says.

    @abstractmethod
    def aggregate(
        self, replica: GradientReplica, columns: Tensor, absent: list[int]
    ) -> Tensor | None:
        """Combine the rows of all workers, in this rank's part of the columns.

        Args:
            replica: What the gradients are of.
            columns: Of shape (N, s) for N workers, rank by rank; not scaled by a GradScaler.
            absent: For each rank, how many of its rows are no gradients; these are NaN.

        Returns:
            Tensor of shape (s,), or ``None`` on all ranks alike if there is nothing to step by.
        """

    def prepare(self, replica: GradientReplica, rows: Tensor) -> Tensor:
        """What this rank sends instead of its gradients.

        Args:
            replica: What the gradients are of.
            rows: Of shape (k, n⌈d/n⌉) for k workers on this rank.
        """
        return rows

    def inspect(self, replica: GradientReplica, rows: Tensor, result: Tensor) -> Tensor:
        """Called with what all ranks made together, which may be put right.

        Args:
            replica: What the gradients are of.
            rows: What this rank sent.
            result: Of shape (n⌈d/n⌉,).
        """
        return result

    @property
    def min_users(self) -> int:
        """How many ranks must have a gradient of a parameter for it to get one."""
        return 1

    @property
    def leaves_gradients_alone(self) -> bool:
        """Whether the gradient of one rank alone comes out as it is."""
        return True

    # Set-up.

    def make_exchange(self) -> AllToAll:
        """Direct messages between all ranks."""
        return AllToAll(self._timeout)

    def setup_distributed(self) -> None:
        """Make the process group, which one process can do without."""
        if self.num_nodes * self.num_processes > 1:
            super().setup_distributed()
        else:
            self.set_world_ranks()

    def setup(self, trainer: Trainer) -> None:
        """On one device nothing is exchanged, not even before an evaluation."""
        if self.world_size == 1 and trainer.state.fn != TrainerFn.FITTING:
            Strategy.setup(self, trainer)
        else:
            super().setup(trainer)

    def _setup_model(self, model: torch.nn.Module) -> torch.nn.Module:  # type: ignore[override]  # never wrapped
        return model

    def begin(self) -> None:
        """Make the replicas."""
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
        self.shared_buffers = SharedBuffers(
            self.exchange, self._named_buffers(), self.buffer_rule, lambda: self._num_steps
        )
        self._num_skipped, self._num_backwards = 0, 0
        self._is_settled = False
        super().begin()

    def _named_buffers(self) -> dict[str, Tensor]:
        return dict(self._module.named_buffers())

    @property
    def replicas(self) -> list[GradientReplica]:
        """What this rank trains, one by optimizer; none outside of training."""
        return self._replicas

    # Training.

    def go_apart(self) -> None:
        """From now on buffers may differ."""
        if self.shared_buffers is not None:
            self.shared_buffers.move()

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """The loss; where there is none, a constant instead, so that this rank goes on with the others."""
        output = super().training_step(*args, **kwargs)
        is_alone = self.exchange is None and self.workers == "rank"
        if output is not None or is_alone or not self._module.automatic_optimization:
            return output
        self._num_skipped += 1
        return torch.zeros((), device=self.root_device, requires_grad=True)

    def post_backward(self, closure_loss: Tensor) -> None:
        """With micro-batches as workers, take the gradient of this one out of the sum."""
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
        """What Lightning divides the loss by."""
        return self._trainer.accumulate_grad_batches

    def before_step(self, replica: Replica) -> None:
        """Combine the gradients between the closure and whatever the precision plugin does with them."""
        self._exchange_gradients(self._replicas[replica.index])

    def after_step(self, replica: Replica) -> None:
        """The step was the same on all ranks."""
        replica.share()

    @torch.no_grad()
    def _exchange_gradients(self, replica: GradientReplica) -> None:
        if self.workers == "rank":
            is_absent = 0 < self._num_backwards == self._num_skipped
            self._num_skipped, self._num_backwards = 0, 0
            if self.exchange is None and self.leaves_gradients_alone:
                return
            replica.pack(1 / self._loss_scale(), absent=is_absent)
        rows = self.prepare(replica, replica.gradients.rows[: replica.gradients.num_packed])
        self._step_by(replica, *self._combine(replica, rows))
        replica.clear()

    def _combine(self, replica: GradientReplica, rows: Tensor) -> tuple[Tensor | None, list[bool]]:
        if self.exchange is None:
            return self.aggregate(replica, rows, [replica.num_absent]), replica.gradients.used
        columns, words = replica.scatter(self.exchange, rows)
        shard = self.aggregate(replica, columns, [num_absent for _, num_absent in words])
        used = replica.used_by(self.exchange, words, lambda count: count >= self.min_users)
        if shard is None:
            return None, used
        return self.inspect(replica, rows, replica.gather(self.exchange, shard)), used

    def _step_by(self, replica: GradientReplica, result: Tensor | None, used: list[bool]) -> None:
        if result is None:  # a GradScaler skips a step by infinity, on all ranks alike
            used = [self.has_scaler] * len(used)
            result = torch.full_like(replica.gradients.rows[0], torch.inf)
        factor = self._loss_scale()
        if self.workers != "rank":
            factor *= replica.gradients.num_packed / self._accumulation
        replica.gradients.unpack(result, used, factor)

    @property
    def has_scaler(self) -> bool:
        """Whether losses are scaled, as for float16."""
        return getattr(self.precision_plugin, "scaler", None) is not None

    def _loss_scale(self) -> float:
        return float(self.precision_plugin.scaler.get_scale()) if self.has_scaler else 1.0  # type: ignore[attr-defined]  # of MixedPrecision

    def settle(self) -> None:
        """Leave the same weights and buffers on every rank, for good."""
        self.agree()
        if self.shared_buffers is not None:
            self.shared_buffers.settle()
        self._is_settled = True

    def close(self) -> None:
        """Put this rank's buffers back, and exchange nothing any more."""
        if self.shared_buffers is not None:
            self.shared_buffers.close()
        self._is_settled = True

    @property
    def can_exchange(self) -> bool:
        """Whether the ranks are in training together."""
        return self.exchange is not None and not self._is_settled and not self._has_failed

    def agree(self) -> None:
        """Find out whether all ranks have the same weights, and give those of the majority to the others."""
        if self.can_exchange and self.exchange is not None:
            agree_on_weights(self.exchange, self._module, self.optimizers, self._num_steps)

    def on_validation_start(self) -> None:
        """Evaluate the same weights and buffers on all ranks."""
        self.agree()
        if self.shared_buffers is not None:
            self.shared_buffers.enter()

    def on_validation_end(self) -> None:
        """Go on with this rank's own buffers."""
        if self.shared_buffers is not None:
            self.shared_buffers.leave()

    def teardown(self) -> None:
        """Free the rows."""
        for replica in self._replicas:
            replica.release()
        super().teardown()

    # Checkpoints.

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The weights and what all ranks agree on as buffers; exchanges, so every rank must come here."""
        state = super().lightning_module_state_dict()
        if self.can_exchange and self.shared_buffers is not None:
            self.agree()
            with self.shared_buffers.shared():
                state = self._with_copies_of_buffers(super().lightning_module_state_dict())
        self._written = state
        return state

    def _with_copies_of_buffers(self, state: dict[str, Any]) -> dict[str, Any]:
        names = self._named_buffers().keys() & state.keys()
        return {**state, **{name: state[name].detach().clone() for name in names}}

    def own_part(self, checkpoint: checkpoints.Checkpoint) -> checkpoints.Checkpoint:
        """Everything but weights and optimizer states, which are the same on all ranks; with this rank's buffers."""
        own = {} if self.shared_buffers is None else self.shared_buffers.own()
        mine = checkpoints.with_own_weights(checkpoint, self._written, own)
        return checkpoints.without_common(mine, self._module.state_dict().keys(), own.keys())

    def in_common(self, state: Mapping[str, Any], exchange: Collectives) -> Mapping[str, Any]:
        """The same weights, and as buffers what all agree on."""
        shared = self.shared_buffers
        names = [] if shared is None else [name for name in shared.buffers if name in state]
        if shared is None or not names:
            return state
        agreed = shared.agreed([state[name] for name in names])
        return {**state, **dict(zip(names, agreed, strict=True))}
