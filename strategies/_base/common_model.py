"""The mean of the models, and how a rank gets it and gets its own back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_sgd._validation import warn_no_effect
from lightning_sgd.functional.distributed.flat_buffers import FlatBuffers
from lightning_sgd.functional.robust.robust_statistics import finite_median, most_frequent
from lightning_sgd.strategies._base.replica import Replica, copies, put_back, state_tensors
from lightning_sgd.strategies._comm.all_to_all import AllToAll
from lightning_sgd.strategies._comm.collectives import Collectives, Purpose
from lightning_sgd.strategies._comm.fingerprints import layout

BufferPolicy: TypeAlias = Literal["average", "local", "rank0"]
OptimizerStatePolicy: TypeAlias = Literal["keep", "reset", "average"]


class Consensus:
    """Averages replicas over the ranks: for good, or only for a while.

    Args:
        exchange: Between the ranks; ``None`` where there is only one, and nothing happens.
        optimizers: What each trains is one replica.
        buffers: Floating-point buffers of the module.
        candidate: This rank's model as it enters the mean; ``None`` for the parameters as they are.
        buffer_policy: What becomes of the buffers when models are averaged.
        state_policy: What becomes of the optimizer state in a round.
    """

    def __init__(
        self,
        exchange: Collectives | None,
        optimizers: Sequence[Optimizer],
        buffers: Sequence[Tensor],
        candidate: Callable[[Replica], Sequence[Tensor] | None],
        buffer_policy: BufferPolicy,
        state_policy: OptimizerStatePolicy,
    ) -> None:
        self.exchange = exchange
        self.replicas = [Replica(index, optimizer) for index, optimizer in enumerate(optimizers)]
        self.candidate = candidate
        self.buffer_policy, self.state_policy = buffer_policy, state_policy
        # Buffers that never change, such as the mean and scale of inputs, must come out as they are.
        self._buffers = FlatBuffers(buffers, exact=True) if buffers else None
        self._buffers_moved = False
        self._local: list[Tensor] | None = None
        self._warned_of_layout = False
        self._is_closed = False

    @property
    def is_entered(self) -> bool:
        """Whether the mean is in the place of this rank's weights."""
        return self._local is not None

    @property
    def is_apart(self) -> bool:
        """Whether ranks may have different models, and can be asked for them."""
        if self.exchange is None or self._is_closed:
            return False
        if any(not r.is_shared or self.candidate(r) is not None for r in self.replicas):
            return True
        return self._buffers_moved and self.buffer_policy != "local"

    def move_buffers(self) -> None:
        """Expect buffers to differ from now on: a batch is going to be trained."""
        self._buffers_moved = self._buffers is not None

    def round(self, replica: Replica, *, measure: bool = False) -> Tensor | None:
        """Give all ranks the mean of their weights, for good; buffers and optimizer state as the policies say.

        Args:
            replica: What one optimizer trains.
            measure: Whether to return how far this rank was from the mean.
        """
        moved = None
        if self.exchange is not None:
            moved = self._average(self.exchange, replica, None, Purpose.ROUND, measure=measure)
            if replica.index == 0:
                self._share_buffers(self.exchange, Purpose.ROUND)
            self._share_state(self.exchange, replica)
        replica.share()
        return moved

    def settle(self) -> None:
        """Give all ranks the mean of their candidates, for good; training is over."""
        self._take()
        for replica in self.replicas:
            replica.share()
        self.close()

    def close(self) -> None:
        """Put this rank's weights back if need be, and take part in nothing any more."""
        self.leave()
        self._is_closed = True

    def enter(self) -> None:
        """Put the mean of the candidates in the place of this rank's weights, if it is not there already."""
        if self._local is None and self.is_apart:
            self._local = copies(self._tensors())
            self._take()

    def leave(self) -> None:
        """Put this rank's weights back, if they are not there already."""
        if self._local is not None:
            put_back(self._tensors(), self._local)
            self._local = None

    @contextmanager
    def mean(self) -> Iterator[None]:
        """With the mean in place, whatever was there before."""
        was_in = self.is_entered
        self.enter()
        try:
            yield
        finally:
            if not was_in:
                self.leave()

    @contextmanager
    def own(self) -> Iterator[None]:
        """With this rank's weights in place, whatever was there before."""
        if self._local is None:
            yield
            return
        mean = copies(self._tensors())
        put_back(self._tensors(), self._local)
        try:
            yield
        finally:
            put_back(self._tensors(), mean)

    def release(self) -> None:
        """Free the buffers until they are needed again."""
        for replica in self.replicas:
            replica.release()

    def _tensors(self) -> list[Tensor]:
        tensors = [tensor for replica in self.replicas for tensor in replica.flat.tensors]
        return tensors if self._buffers is None else tensors + self._buffers.tensors

    def _take(self) -> None:
        if self.exchange is None or not self.is_apart:
            return
        for replica in self.replicas:
            source = self.candidate(replica)
            if source is not None or not replica.is_shared:
                self._average(self.exchange, replica, source, Purpose.CONSENSUS)
        self._share_buffers(self.exchange, Purpose.CONSENSUS)

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
        flat.pack(None if source is None else [*source, *replica.passengers])
        exchange.mean(flat, purpose, replica.num_steps)
        moved = replica.distance() if measure else None
        flat.unpack()
        return moved

    def _share_buffers(self, exchange: Collectives, purpose: Purpose) -> None:
        if self._buffers is None or self.buffer_policy == "local":
            return
        self._buffers.pack()
        share = exchange.mean if self.buffer_policy == "average" else exchange.broadcast
        share(self._buffers, purpose, self.replicas[0].num_steps)
        self._buffers.unpack()
        if purpose is Purpose.ROUND:
            self._buffers_moved = False

    def _share_state(self, exchange: Collectives, replica: Replica) -> None:
        if self.state_policy == "reset":
            replica.optimizer.state.clear()
        if self.state_policy != "average":
            return
        tensors = state_tensors(replica.optimizer)
        # A rank may lack the state of a parameter that it has not used yet, or whose first step a GradScaler skipped.
        if not exchange.agree(sum(tensor.numel() for tensor in tensors), replica.num_steps):
            self._warn_of_layout()
        elif tensors:
            flat = FlatBuffers(tensors)
            flat.pack()
            exchange.mean(flat, Purpose.STATE, replica.num_steps)
            flat.unpack()

    def _warn_of_layout(self) -> None:
        if not self._warned_of_layout:
            warn_no_effect(
                "optimizer_state='average' waits until all ranks have state for the same parameters."
            )
        self._warned_of_layout = True


BufferRule: TypeAlias = Literal["median", "mean", "rank0", "local"]

RULES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "median": finite_median,
    "mean": lambda rows: rows.mean(dim=0),
    "rank0": lambda rows: rows[0],
}


class SharedBuffers:
    """Puts what the ranks agree on in the place of the buffers: for a while, or for good.

    Args:
        exchange: Between the ranks; ``None`` where there is only one, and nothing happens.
        buffers: Of the module, by name.
        rule: How floating-point buffers are combined; of others the most frequent value is taken.
        step: Tells optimizer steps so far.
    """

    def __init__(
        self,
        exchange: AllToAll | None,
        buffers: Mapping[str, Tensor],
        rule: BufferRule,
        step: Callable[[], int],
    ) -> None:
        self.exchange, self.rule, self.step = exchange, rule, step
        self.buffers = dict(buffers)
        self._own: list[Tensor] | None = None
        self._is_apart = False

    @property
    def is_apart(self) -> bool:
        """Whether ranks may have different buffers, and can be asked for them."""
        return self._is_apart and self.exchange is not None and self._own is None

    def move(self) -> None:
        """Expect buffers to differ from now on: a batch is going to be trained."""
        self._is_apart = bool(self.buffers) and self.rule != "local"

    def enter(self) -> None:
        """Put what all agree on in the place of this rank's own."""
        if self.is_apart:
            own = copies(self._tensors())
            put_back(self._tensors(), self.agreed(own))
            self._own = own

    def leave(self) -> None:
        """Put this rank's own back, if they are not there already."""
        if self._own is not None:
            put_back(self._tensors(), self._own)
            self._own = None

    def settle(self) -> None:
        """Put what all agree on in the place of this rank's own, for good."""
        self.enter()
        self._own, self._is_apart = None, False

    def close(self) -> None:
        """Put this rank's own back, and ask nobody any more."""
        self.leave()
        self._is_apart = False

    @contextmanager
    def shared(self) -> Iterator[None]:
        """With what all agree on in place, whatever was there before."""
        was_in = self._own is not None
        self.enter()
        try:
            yield
        finally:
            if not was_in:
                self.leave()

    def own(self) -> dict[str, Tensor]:
        """This rank's own, by name, whatever is in their place."""
        tensors = self._tensors() if self._own is None else self._own
        return dict(zip(self.buffers, copies(tensors), strict=True))

    def agreed(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """What all ranks agree on.

        Args:
            tensors: This rank's, of the same shapes and types on all.
        """
        agreed = copies(tensors)
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
        combined = rule(self._of_all_ranks(self.exchange, mine, tensors))
        for tensor, part in zip(
            tensors, torch.split(combined, [x.numel() for x in tensors]), strict=True
        ):
            tensor.copy_(part.view(tensor.shape))

    def _of_all_ranks(self, exchange: AllToAll, mine: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        rows = mine.new_empty(exchange.num_ranks, len(mine))
        exchange.trade(
            dict.fromkeys(range(exchange.num_ranks), mine),
            dict(enumerate(rows)),
            (),
            Purpose.CONSENSUS,
            self.step(),
            layout=layout(("", tensor) for tensor in tensors),
        )
        return rows

    def _tensors(self) -> list[Tensor]:
        return list(self.buffers.values())
