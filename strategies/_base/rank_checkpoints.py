"""Writing one checkpoint for all ranks, and giving each rank its part back."""

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
    """The steps of saving and loading where every rank has something of its own.

    A subclass says what a rank would have written alone (:meth:`own_part`), what all have in common
    (:meth:`in_common`), and what else there is to keep.
    """

    exchange: Collectives | None

    _is_resumed = False
    _random_states: Mapping[str, Any] | None = None
    _written: Mapping[str, Any] | None = None  # the module's state as Lightning was given it

    # What a subclass says.

    @property
    @abstractmethod
    def replicas(self) -> Sequence[Replica]:
        """What this rank trains, one by optimizer; none outside of training."""

    @property
    @abstractmethod
    def is_connected(self) -> bool:
        """Whether there are other ranks, and all of them can be expected to answer."""

    @abstractmethod
    def own_part(self, checkpoint: checkpoints.Checkpoint) -> checkpoints.Checkpoint:
        """What this rank would have written alone, as far as the others have something else.

        Args:
            checkpoint: As Lightning and the callbacks made it.
        """

    @abstractmethod
    def in_common(self, state: Mapping[str, Any], exchange: Collectives) -> Mapping[str, Any]:
        """What all ranks have in common where a callback has put a model of its own, one per rank.

        Args:
            state: State of that model on this rank.
            exchange: Between the ranks; all come here.
        """

    def go_apart(self) -> None:
        """Expect that from now on ranks have different things."""

    def start_alike(self) -> None:
        """Called instead where the checkpoint was no use for each rank's own: all have the same."""

    def own_state(self) -> dict[str, Any]:
        """What a subclass needs of its own to resume: tensors, numbers, strings, lists, dictionaries."""
        return {}

    def load_own_state(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`own_state`.

        Args:
            state: What it returned on this rank.
        """

    def shared_state(self) -> dict[str, Any]:
        """What a subclass needs to resume that is the same on all ranks."""
        return {}

    def load_shared_state(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`shared_state`, perhaps on another number of ranks.

        Args:
            state: What it returned.
        """

    # Saving.

    @property
    def num_ranks(self) -> int:
        """Number of ranks that take part."""
        return 1 if self.exchange is None else self.exchange.num_ranks

    @property
    def _num_steps(self) -> int:
        return self.replicas[0].num_steps if self.replicas else 0

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: _PATH, storage_options: Any | None = None
    ) -> None:
        """Write what all have in common, and in one more key what each rank needs to go on."""
        if "optimizer_states" in checkpoint and self.replicas:
            checkpoint = self._with_all_ranks(checkpoint)
        self._written = None
        super().save_checkpoint(checkpoint, filepath, storage_options)

    def _with_all_ranks(self, checkpoint: checkpoints.Checkpoint) -> checkpoints.Checkpoint:
        part = checkpoints.rank_part(self.own_part(checkpoint), self._state())
        shared = self.shared_state()
        if not self.is_connected or self.exchange is None:
            return checkpoints.with_ranks(checkpoint, [part], self.num_ranks, shared)
        if checkpoint["state_dict"] is not self._written:  # as WeightAveraging does
            common = self.in_common(checkpoint["state_dict"], self.exchange)
            checkpoint = {**checkpoint, "state_dict": common}
        parts = self.exchange.gather(part, self._num_steps)
        if parts is None:
            return checkpoint
        # What this rank's part shares with the rest of the file is written once.
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
        """What the file holds: for training on as many ranks this rank's part, else what all have in common."""
        checkpoint = super().load_checkpoint(checkpoint_path, weights_only)
        module = self.lightning_module
        if module is None or module.trainer.state.fn != TrainerFn.FITTING:
            return checkpoint
        self._is_resumed = checkpoints.is_complete(checkpoint, self.world_size)
        return checkpoints.for_rank(checkpoint, self.global_rank, self.world_size)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Restore the optimizers, then counts, generators and what the subclass keeps."""
        super().load_optimizer_state_dict(checkpoint)
        state = checkpoint.get(checkpoints.KEY)
        if state is None or not self.replicas:
            return
        for replica, saved in zip(self.replicas, state["replicas"], strict=True):
            replica.load_state_dict(saved)
        self.load_shared_state(state.get("shared", {}))
        if "own" not in state:  # the training was on another number of ranks
            self.start_alike()
            return
        self.go_apart()
        self.load_own_state(state["own"])
        self._random_states = state["random"]

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Put random generators where they were before an interruption; from now on ranks may differ."""
        if self._random_states is not None:
            checkpoints.set_random_states(self._random_states)
            self._random_states = None
        self.go_apart()
