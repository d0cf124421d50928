"""The model that all ranks have in common, in place of each rank's own: for evaluation, checkpoints and the end."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_sgd._validation import warn_no_effect
from lightning_sgd.functional.distributed.flat_buffers import FlatBuffers, unique
from lightning_sgd.functional.robust.robust_statistics import finite_median, most_frequent
from lightning_sgd.strategies._base.replica import Replica, clone_all, copy_all_, state_tensors
from lightning_sgd.strategies._comm.all_to_all import AllToAll
from lightning_sgd.strategies._comm.collectives import Collectives, Purpose
from lightning_sgd.strategies._comm.fingerprints import fingerprint, layout

BufferPolicy: TypeAlias = Literal["average", "local", "rank0"]
OptimizerStatePolicy: TypeAlias = Literal["keep", "reset", "average"]
BufferRule: TypeAlias = Literal["median", "mean", "rank0", "local"]

RULES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "median": finite_median,
    "mean": lambda rows: rows.mean(dim=0),
    "rank0": lambda rows: rows[0],
}


class CommonModel(ABC):
    """Replaces this rank's own tensors by values that all ranks have in common, temporarily or for good.

    A subclass says which tensors these are and how the common values are made. As a context manager it has the common
    values in place inside the block.
    """

    def __init__(self) -> None:
        self._own: list[Tensor] | None = (
            None  # copies of this rank's tensors while the common values are in place
        )
        self.is_closed = False

    @property
    @abstractmethod
    def is_diverged(self) -> bool:
        """Whether ranks may have different tensors, and can be asked for them."""

    @abstractmethod
    def mark_diverged(self) -> None:
        """Expect tensors to differ from now on, because a batch is about to be trained."""

    @abstractmethod
    def tensors(self) -> list[Tensor]:
        """Return the tensors that are replaced."""

    @abstractmethod
    def _load(self) -> None:
        """Replace the tensors by the common values; all ranks call this together."""

    def swap_in(self) -> None:
        """Put the common values in place, unless they are there already."""
        if self._own is None and self.is_diverged:
            # Before the exchange: if it fails, `close` restores what it has overwritten.
            self._own = clone_all(self.tensors())
            self._load()

    def swap_out(self) -> None:
        """Restore this rank's own tensors, unless they are there already."""
        if self._own is not None:
            copy_all_(self.tensors(), self._own)
            self._own = None

    def finalize(self) -> None:
        """Put the common values in place for good, at the end of training."""
        if self._own is None and self.is_diverged:
            self._load()
        self._own, self.is_closed = None, True

    def close(self) -> None:
        """Restore this rank's own tensors and exchange nothing any more, because a rank has failed."""
        self.swap_out()
        self.is_closed = True

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Put the common values in place for a block, whichever were there before."""
        was_in = self._own is not None
        self.swap_in()
        try:
            yield
        finally:
            if not was_in:
                self.swap_out()

    @contextmanager
    def own(self) -> Iterator[None]:
        """Put this rank's own tensors in place for a block, whichever were there before."""
        if self._own is None:
            yield
            return
        common = clone_all(self.tensors())
        copy_all_(self.tensors(), self._own)
        try:
            yield
        finally:
            copy_all_(self.tensors(), common)


class MeanModel(CommonModel):
    """The mean of the ranks' models, which also continues training after a round.

    Parameters that no optimizer trains are not part of the rounds, but of the common model: user code may change them,
    as a teacher that follows the weights. Ranks compare them by hashes before each use of the common model, and average
    those that differ, so that frozen layers cost next to no traffic.

    Args:
        exchange: Connects the ranks; ``None`` on one rank, where nothing happens.
        optimizers: The parameters of each make one replica.
        parameters: Floating-point parameters of the module.
        buffers: Floating-point buffers of the module.
        model_to_average: Returns this rank's model as it enters the mean; ``None`` for the parameters themselves.
        buffer_policy: What happens to the buffers when models are averaged.
        state_policy: What happens to the optimizer state in a round.
    """

    def __init__(
        self,
        exchange: Collectives | None,
        optimizers: Sequence[Optimizer],
        parameters: Sequence[Tensor],
        buffers: Sequence[Tensor],
        model_to_average: Callable[[Replica], Sequence[Tensor] | None],
        buffer_policy: BufferPolicy,
        state_policy: OptimizerStatePolicy,
    ) -> None:
        super().__init__()
        self.exchange = exchange
        self.replicas = [Replica(index, optimizer) for index, optimizer in enumerate(optimizers)]
        self.model_to_average = model_to_average
        self.buffer_policy, self.state_policy = buffer_policy, state_policy
        # In float64: buffers that never change, such as the mean and scale of inputs, must keep every bit.
        self._buffers = FlatBuffers(buffers, exact=True) if buffers and exchange else None
        self._buffers_diverged = False
        self._parameters = unique(parameters)
        self._has_trained = False
        self._differing: FlatBuffers | None = None  # parameters outside the optimizers
        self._has_warned = False

    @property
    def is_diverged(self) -> bool:
        """Whether weights or buffers may differ."""
        if self.exchange is None or self.is_closed:
            return False
        if any(not r.is_shared or self.model_to_average(r) is not None for r in self.replicas):
            return True
        if self._has_trained and self._untrained():
            return True
        return self._buffers_diverged and self.buffer_policy != "local"

    def mark_diverged(self) -> None:
        """Expect buffers to differ; the replicas record by themselves whether their weights do."""
        self._buffers_diverged = self._buffers is not None
        self._has_trained = True

    def swap_in(self) -> None:
        """Put the common values in place, unless they are there already."""
        self._find_differing()
        super().swap_in()

    def _find_differing(self) -> None:
        """Find the parameters outside the optimizers that differ between ranks; all ranks call this together."""
        if self._own is not None or not self.is_diverged or self.exchange is None:
            return
        self._differing = None
        untrained = self._untrained() if self._has_trained else []
        if not untrained:
            return
        # By their contents: changes by way of `param.data` leave no other trace.
        prints = [fingerprint([param]) for param in untrained]
        equal = self.exchange.equal(prints, self.replicas[0].num_steps)
        differing = [param for param, same in zip(untrained, equal, strict=True) if not same]
        self._differing = FlatBuffers(differing, exact=True) if differing else None

    def _untrained(self) -> list[Tensor]:
        trained = {id(tensor) for replica in self.replicas for tensor in replica.tensors}
        return [param for param in self._parameters if id(param) not in trained]

    def tensors(self) -> list[Tensor]:
        """Return parameters and buffers."""
        flats = [replica.flat for replica in self.replicas]
        others = [flat for flat in (self._buffers, self._differing) if flat is not None]
        return [tensor for flat in [*flats, *others] for tensor in flat.tensors]

    def average(self, replica: Replica, *, measure: bool = False) -> Tensor | None:
        """Continue training from the mean of the weights; buffers and optimizer state as the policies say.

        Args:
            replica: Parameters of one optimizer.
            measure: Whether to return the distance of this rank's weights from the mean.
        """
        moved = None
        if self.exchange is not None:
            # All ranks exchange weights, buffers and optimizer state in this order.
            moved = self._average(self.exchange, replica, None, Purpose.ROUND, measure=measure)
            if replica.index == 0:
                self._average_buffers(self.exchange, Purpose.ROUND)
            self._average_state(self.exchange, replica)
        replica.share()
        return moved

    def finalize(self) -> None:
        """Leave the mean on all ranks."""
        self._find_differing()
        super().finalize()
        for replica in self.replicas:
            replica.share()

    def _load(self) -> None:
        assert self.exchange is not None
        for replica in self.replicas:
            source = self.model_to_average(replica)
            if source is not None or not replica.is_shared:
                self._average(self.exchange, replica, source, Purpose.CONSENSUS)
        self._average_buffers(self.exchange, Purpose.CONSENSUS)
        if self._differing is not None:
            self._differing.pack()
            num_steps = self.replicas[0].num_steps
            self.exchange.all_reduce_mean(self._differing, Purpose.CONSENSUS, num_steps)
            self._differing.unpack()

    @staticmethod
    def _average(
        exchange: Collectives,
        replica: Replica,
        source: Sequence[Tensor] | None,
        purpose: Purpose,
        *,
        measure: bool = False,
    ) -> Tensor | None:
        flat = replica.flat
        flat.pack(None if source is None else [*source, *replica.extra_tensors])
        exchange.all_reduce_mean(flat, purpose, replica.num_steps)
        moved = replica.distance() if measure else None
        flat.unpack()
        return moved

    def _average_buffers(self, exchange: Collectives, purpose: Purpose) -> None:
        if self._buffers is None or self.buffer_policy == "local":
            return
        self._buffers.pack()
        is_mean = self.buffer_policy == "average"
        combine = exchange.all_reduce_mean if is_mean else exchange.broadcast
        combine(self._buffers, purpose, self.replicas[0].num_steps)
        self._buffers.unpack()
        if purpose is Purpose.ROUND:
            self._buffers_diverged = False

    def _average_state(self, exchange: Collectives, replica: Replica) -> None:
        if self.state_policy == "reset":
            replica.optimizer.state.clear()
        if self.state_policy != "average":
            return
        tensors = state_tensors(replica.optimizer)
        # A rank may lack the state of a parameter that it has not used yet, or whose first step a GradScaler skipped.
        if not exchange.all_equal(sum(tensor.numel() for tensor in tensors), replica.num_steps):
            self._warn_of_missing_state()
        elif tensors:
            flat = FlatBuffers(tensors)
            flat.pack()
            exchange.all_reduce_mean(flat, Purpose.STATE, replica.num_steps)
            flat.unpack()

    def _warn_of_missing_state(self) -> None:
        if not self._has_warned:
            warn_no_effect(
                "optimizer_state='average' waits until all ranks have state for the same parameters."
            )
        self._has_warned = True


class AgreedBuffers(CommonModel):
    """Buffers on which all ranks agree, beside weights that are equal anyway.

    Args:
        exchange: Connects the ranks; ``None`` on one rank, where nothing happens.
        buffers: Buffers of the module by name.
        rule: How floating-point buffers are combined; of others the most frequent value is taken.
        step: Returns the optimizer steps so far.
    """

    def __init__(
        self,
        exchange: AllToAll | None,
        buffers: Mapping[str, Tensor],
        rule: BufferRule,
        step: Callable[[], int],
    ) -> None:
        super().__init__()
        self.exchange, self.rule, self.step = exchange, rule, step
        self.buffers = dict(buffers)
        self._is_diverged = False

    @property
    def is_diverged(self) -> bool:
        """Whether buffers may differ."""
        return self._is_diverged and self.exchange is not None and not self.is_closed

    def mark_diverged(self) -> None:
        """Expect buffers to differ, if there are any that are combined."""
        self._is_diverged = bool(self.buffers) and self.rule != "local"

    def tensors(self) -> list[Tensor]:
        """Return the buffers."""
        return list(self.buffers.values())

    def _load(self) -> None:
        copy_all_(self.tensors(), self.agree(self.tensors()))

    def agree(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Combine tensors of the same shapes and types over the ranks; this rank's stay as they are."""
        agreed = clone_all(tensors)
        for indices, dtype, rule in self._kinds(agreed):
            self._combine([agreed[index] for index in indices], dtype, rule)
        return agreed

    def _kinds(
        self, tensors: Sequence[Tensor]
    ) -> Iterator[tuple[list[int], torch.dtype, Callable[[Tensor], Tensor]]]:
        floating = [i for i, x in enumerate(tensors) if x.is_floating_point()]
        others = [i for i, x in enumerate(tensors) if not x.dtype.is_complex and i not in floating]
        integers = most_frequent if self.rule != "rank0" else RULES["rank0"]
        yield floating, torch.float64, RULES[self.rule]
        yield others, torch.int64, integers

    def _combine(
        self, tensors: Sequence[Tensor], dtype: torch.dtype, rule: Callable[[Tensor], Tensor]
    ) -> None:
        if not tensors or self.exchange is None:
            return
        mine = torch.cat([tensor.reshape(-1).to(dtype) for tensor in tensors])
        combined = rule(self._gather(self.exchange, mine, tensors))
        parts = torch.split(combined, [tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view(tensor.shape))

    def _gather(self, exchange: AllToAll, mine: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        rows = mine.new_empty(exchange.num_ranks, len(mine))
        # Not by `all_gather`, which does not check that all ranks have the same buffers.
        exchange.all_to_all(
            dict.fromkeys(range(exchange.num_ranks), mine),
            dict(enumerate(rows)),
            (),
            Purpose.CONSENSUS,
            self.step(),
            layout=layout(("", tensor) for tensor in tensors),
        )
        return rows
