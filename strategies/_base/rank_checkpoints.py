"""Write one checkpoint for all ranks, and give each rank its part back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn

from lightning_sgd.strategies._base import checkpoint_format as checkpoints
from lightning_sgd.strategies._base.replica import Replica
from lightning_sgd.strategies._comm.collectives import Collectives


class RankCheckpoints(DDPStrategy, ABC):
    """Saves and loads checkpoints of trainings in which every rank has a state of its own.

    A subclass says what a rank would have written alone (:meth:`rank_state`), how models are averaged over the ranks
    (:meth:`average_over_ranks`), and what else has to be kept.
    """

    exchange: Collectives | None

    _is_resumed = False
    _random_states: Mapping[str, Any] | None = None
    _written: Mapping[str, Any] | None = None  # the state dictionary that Lightning got last

    # Hooks of a subclass.

    @property
    @abstractmethod
    def replicas(self) -> Sequence[Replica]:
        """What this rank trains, one per optimizer; empty outside of training."""

    @property
    @abstractmethod
    def is_connected(self) -> bool:
        """Whether there are other ranks, and all of them can be expected to answer."""

    @abstractmethod
    def rank_state(self, checkpoint: checkpoints.Checkpoint) -> checkpoints.Checkpoint:
        """Return what this rank would have written alone, as far as it differs from rank to rank.

        Args:
            checkpoint: As Lightning and the callbacks made it.
        """

    @abstractmethod
    def average_over_ranks(
        self, state: Mapping[str, Any], exchange: Collectives
    ) -> Mapping[str, Any]:
        """Average over the ranks a model that a callback put in place, such as weight averaging's.

        Args:
            state: State dictionary of that model on this rank.
            exchange: Connects all ranks, which call this together.
        """

    def mark_diverged(self) -> None:
        """Expect ranks to differ from now on."""

    def start_from_common(self) -> None:
        """Start all ranks from the shared model, because the checkpoint has no per-rank state for them."""

    def own_state(self) -> dict[str, Any]:
        """Return state of this rank: tensors, numbers, strings, lists and dictionaries."""
        return {}

    def load_own_state(self, state: dict[str, Any]) -> None:
        """Restore :meth:`own_state` of this rank."""

    def shared_state(self) -> dict[str, Any]:
        """Return state that is the same on all ranks."""
        return {}

    def load_shared_state(self, state: dict[str, Any]) -> None:
        """Restore :meth:`shared_state`, possibly on another number of ranks."""

    # Saving.

    @property
    def num_ranks(self) -> int:
        """Number of ranks in the training."""
        return 1 if self.exchange is None else self.exchange.num_ranks

    @property
    def _num_steps(self) -> int:
        return self.replicas[0].num_steps if self.replicas else 0

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: _PATH, storage_options: Any | None = None
    ) -> None:
        """Write the common model, and under one more key what each rank needs to resume."""
        if "optimizer_states" in checkpoint and self.replicas:
            checkpoint = self._with_all_ranks(checkpoint)
        self._written = None
        super().save_checkpoint(checkpoint, filepath, storage_options)

    def _with_all_ranks(self, checkpoint: checkpoints.Checkpoint) -> checkpoints.Checkpoint:
        # `own_state` waits for pending communication, so that it comes before any further exchange.
        part = checkpoints.rank_part(self.rank_state(checkpoint), self._state())
        shared = self.shared_state()
        if not self.is_connected or self.exchange is None:
            return checkpoints.with_ranks(checkpoint, [part], self.num_ranks, shared)
        if (
            checkpoint["state_dict"] is not self._written
        ):  # a callback replaced it, as WeightAveraging does
            average = self.average_over_ranks(checkpoint["state_dict"], self.exchange)
            checkpoint = {**checkpoint, "state_dict": average}
        parts = self.exchange.gather_object(part, self._num_steps)
        if parts is None:
            return checkpoint
        # Rank 0's own part, not the copy that was gathered: storage that it shares with the rest is written once.
        return checkpoints.with_ranks(checkpoint, [part, *parts[1:]], self.num_ranks, shared)

    def _state(self) -> dict[str, Any]:
        return {
            "replicas": [replica.state_dict() for replica in self.replicas],
            "random": checkpoints.random_states(),
            "own": self.own_state(),
        }

    # Loading.

    def load_checkpoint(
        self, checkpoint_path: _PATH, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read this rank's part to resume on the same number of ranks, else the common model."""
        checkpoint = super().load_checkpoint(checkpoint_path, weights_only)
        module = self.lightning_module
        if module is None or module.trainer.state.fn != TrainerFn.FITTING:
            return checkpoint
        self._is_resumed = checkpoints.is_complete(checkpoint, self.world_size)
        return checkpoints.for_rank(checkpoint, self.global_rank, self.world_size)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Restore the optimizers, then the counts, random generators and state of the subclass."""
        super().load_optimizer_state_dict(checkpoint)
        state = checkpoint.get(checkpoints.KEY)
        if state is None or not self.replicas:
            return
        for replica, saved in zip(self.replicas, state["replicas"], strict=True):
            replica.load_state_dict(saved)
        self.load_shared_state(state.get("shared", {}))
        if "own" not in state:  # the checkpoint is of another number of ranks
            self.start_from_common()
            return
        self.mark_diverged()
        self.load_own_state(state["own"])
        self._random_states = state["random"]

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Restore the random generators before the first batch, and expect ranks to differ from now on."""
        # As late as here, because Lightning draws numbers between loading and the first batch.
        if self._random_states is not None:
            checkpoints.set_random_states(self._random_states)
            self._random_states = None
        self.mark_diverged()
