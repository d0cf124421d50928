"""Collectives on process groups of their own: counted, timed, and checked to be the same one on every rank."""

from __future__ import annotations

import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from enum import IntEnum
from threading import Thread
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _get_default_store

from lightning_sgd.functional.distributed.flat_buffers import HEADER, FlatBuffers
from lightning_sgd.functional.distributed.traffic import (
    Traffic,
    all_reduce_traffic,
    broadcast_traffic,
    send_traffic,
)
from lightning_sgd.strategies._comm.failures import (
    ExchangeError,
    FailureReports,
    describe_mismatch,
    is_failed_exchange,
)
from lightning_sgd.strategies._comm.in_flight import (
    InFlight,
    PendingMean,
    PendingSendRecv,
    start_messages,
)

if TYPE_CHECKING:
    from datetime import timedelta


class Purpose(IntEnum):
    """The purpose of an exchange, which must be the same on all ranks."""

    GRADIENTS = 0
    ROUND = 1
    CONSENSUS = 2
    STATE = 3
    GOSSIP = 4
    ANCHOR = 5
    WEIGHTS = 6
    AUDIT = 7


# Coprime to the number of purposes, so that a purpose has different tags in 61 successive steps.
NUM_TAGS = 61
"""Tags are small enough that sums of their squares are exact in float32 for thousands of ranks."""

ABORT_SECONDS = 2.0
"""How long to wait for pending communication when a rank fails; the end of its process closes the rest."""


class Collectives:
    r"""Collectives on process groups of their own, so that those of metrics and Lightning never queue behind them.

    Every buffer carries a tag t of purpose and step in two elements, t and t², which are summed with the rest. By the
    inequality of Cauchy and Schwarz :math:`n\sum t^2 = (\sum t)^2` only if all tags are equal. A rank that has run out
    of data, for example, is detected; its evaluation is not added to the training step of another rank.

    Messages between neighbours carry the same tag, and the receiver compares it with its own.

    ``purpose`` and ``step``, the optimizer steps so far, must be the same on all ranks.

    Args:
        timeout: How long a rank waits for the others.
        in_background: Create a second group for exchanges that overlap with others.
    """

    def __init__(self, timeout: timedelta | None, *, in_background: bool = False) -> None:
        self.rank, self.num_ranks = dist.get_rank(), dist.get_world_size()
        self.traffic = Traffic()
        self._in_flight: list[InFlight] = []
        self.world = dist.group.WORLD
        # `new_group` is collective: all ranks create the groups in this order.
        self.group = dist.new_group(timeout=timeout)
        self.background = dist.new_group(timeout=timeout) if in_background else self.group
        # Objects travel on the CPU, whatever the backend of tensors is.
        self.objects = dist.new_group(timeout=timeout, backend="gloo")
        self.failure_reports = FailureReports(self.rank, self.num_ranks, _get_default_store())

    @property
    def is_valid(self) -> bool:
        """Whether the default process group at construction still exists."""
        return dist.is_initialized() and dist.group.WORLD is getattr(self, "world", None)

    def all_reduce_mean(self, flat: FlatBuffers, purpose: Purpose, step: int) -> None:
        """Replace packed buffers by their mean over the ranks; all ranks get the same bits."""
        tag = _tag(purpose, step)
        with self._timed(purpose, step):
            for buffer in flat.buffers:
                _stamp(buffer, tag)
                dist.all_reduce(buffer, group=self.group)
                self._count(*all_reduce_traffic(buffer.nbytes, self.num_ranks))
                if not _is_stamped_alike(buffer, self.num_ranks):
                    self._raise_mismatch(purpose, step)
                buffer.div_(self.num_ranks)

    def all_reduce_mean_async(self, flat: FlatBuffers, step: int) -> PendingMean:
        """Start :meth:`all_reduce_mean`; the buffers must not be touched before :meth:`wait_mean`."""
        pending = PendingMean(flat=flat, step=step)
        with self._timed(Purpose.ANCHOR, step):
            for buffer in flat.buffers:
                _stamp(buffer, _tag(Purpose.ANCHOR, step))
                # In a group of its own, so that no blocking exchange queues behind it.
                work = dist.all_reduce(buffer, group=self.background, async_op=True)
                pending.works.append(work)
                self._count(*all_reduce_traffic(buffer.nbytes, self.num_ranks))
        self._in_flight.append(pending)
        return pending

    def wait_mean(self, pending: PendingMean) -> None:
        """Wait for the mean; all ranks get the same bits."""
        # Removed before waiting: `abort`, which a failure here calls, must not keep the failed operation alive.
        self._in_flight.remove(pending)
        with self._timed(Purpose.ANCHOR, pending.step):
            pending.wait()
        for buffer in pending.flat.buffers:
            if not _is_stamped_alike(buffer, self.num_ranks):
                self._raise_mismatch(Purpose.ANCHOR, pending.step)
            buffer.div_(self.num_ranks)

    def send_recv_async(
        self,
        outgoing: Sequence[Tensor],
        send: Sequence[int],
        receive: Mapping[int, Sequence[Tensor]],
        step: int,
    ) -> PendingSendRecv:
        """Start sending the same buffers to some ranks and receiving from others.

        Args:
            outgoing: Buffers that must not be touched before :meth:`wait_send_recv`.
            send: Destination ranks.
            receive: Buffers by source rank.
            step: Optimizer steps so far.
        """
        pending = PendingSendRecv(receive=receive, step=step)
        with self._timed(Purpose.GOSSIP, step):
            for buffer in outgoing:
                _stamp(buffer, _tag(Purpose.GOSSIP, step))
                self._count(*send_traffic(buffer.nbytes, len(send)))
            pending.works = start_messages(dict.fromkeys(send, outgoing), receive, self.background)
        self._in_flight.append(pending)
        return pending

    def wait_send_recv(self, pending: PendingSendRecv) -> None:
        """Wait until all messages have been sent and received."""
        self._in_flight.remove(pending)
        with self._timed(Purpose.GOSSIP, pending.step):
            pending.wait()
        for peer, buffers in pending.receive.items():
            # Compared with the own tag, not by a sum: a message comes from one rank.
            if any(int(buffer[0]) != _tag(Purpose.GOSSIP, pending.step) for buffer in buffers):
                self._raise_stray(peer, pending.step)

    def broadcast(self, flat: FlatBuffers, purpose: Purpose, step: int) -> None:
        """Replace packed buffers by those of rank 0."""
        with self._timed(purpose, step):
            for buffer in flat.buffers:
                dist.broadcast(buffer, src=0, group=self.group)
                self._count(*broadcast_traffic(buffer.nbytes, self.num_ranks))

    def all_equal(self, value: int, step: int) -> bool:
        """Tell whether all ranks pass the same number."""
        return self.equal([value], step)[0]

    def equal(self, values: Sequence[int], step: int) -> list[bool]:
        """Tell for each of some numbers, equally many on all ranks, whether all ranks pass the same."""
        # The largest of −value is minus the smallest: one collective gives both ends.
        extremes = torch.tensor([values, [-value for value in values]])
        with self._timed(Purpose.STATE, step):
            dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=self.objects)
            self._count(*all_reduce_traffic(extremes.nbytes, self.num_ranks))
        largest, smallest = extremes[0], -extremes[1]
        return (largest == smallest).tolist()

    def gather_object(self, thing: Any, step: int) -> list[Any] | None:
        """Gather containers of CPU tensors on rank 0, in order of rank; other ranks get ``None``."""
        things = [None] * self.num_ranks if self.rank == 0 else None
        with self._timed(Purpose.STATE, step):
            dist.gather_object(thing, things, dst=0, group=self.objects)
        return things

    def all_gather_object(self, thing: Any) -> list[Any]:
        """Gather small objects on every rank, in order of rank."""
        things: list[Any] = [None] * self.num_ranks
        dist.all_gather_object(things, thing, group=self.objects)
        return things

    def _count(self, num_bytes: float, num_messages: int) -> None:
        self.traffic.num_bytes += num_bytes
        self.traffic.num_messages += num_messages

    @contextmanager
    def _timed(self, purpose: Purpose, step: int) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        except RuntimeError as error:
            if not is_failed_exchange(error):
                raise
            raise ExchangeError(self._explain(error, place(purpose, step))) from error
        finally:
            self.traffic.seconds += time.perf_counter() - begin

    def _explain(self, error: Exception, where: str) -> str:
        traceback.clear_frames(error.__traceback__)  # their local variables keep the group alive
        self.abort()
        diagnosis = self.failure_reports.collect(where)
        return f"Rank {self.rank} could not finish the exchange of {where}. {diagnosis}"

    def abort(self) -> None:
        """Close all connections, so that ranks that wait for this one notice its failure at once."""
        # Handles hold their group, and the group holds its connections.
        for pending in self._in_flight:
            pending.works.clear()
        kept = [self.__dict__.pop("background", None)] if self._in_flight else []
        # References first: `destroy_process_group` closes only groups that nobody else holds.
        for name in ("group", "background", "objects", "world"):
            self.__dict__.pop(name, None)
        with suppress(Exception):
            dist.destroy_process_group()
        # Closing a group blocks until its pending operations have finished or timed out, hence the thread.
        closing = Thread(target=kept.clear, daemon=True)
        closing.start()
        closing.join(ABORT_SECONDS)

    def _raise_stray(self, peer: int, step: int) -> None:
        where = place(Purpose.GOSSIP, step)
        self.abort()
        diagnosis = self.failure_reports.collect(where)
        raise ExchangeError(
            f"Rank {self.rank} is in the exchange of {where}, but rank {peer} sent it a message of another one. "
            f"{diagnosis}"
        )

    def _raise_mismatch(self, purpose: Purpose, step: int) -> None:
        # Every rank sees the same sum of tags, so that all come here.
        places = self.all_gather_object(place(purpose, step))
        raise ExchangeError(describe_mismatch(dict(enumerate(places))))


def place(purpose: Purpose, step: int) -> str:
    """Name an exchange for error messages, such as "round after step 12"."""
    return f"{purpose.name.lower()} after step {step}"


def _tag(purpose: Purpose, step: int) -> int:
    return (len(Purpose) * step + purpose) % NUM_TAGS


def _stamp(buffer: Tensor, tag: int) -> None:
    buffer[:HEADER] = torch.tensor([tag, tag * tag], dtype=buffer.dtype)


def _is_stamped_alike(buffer: Tensor, num_ranks: int) -> bool:
    # Sums of small whole numbers are exact, so equality can be asked for.
    total, squares = buffer[:HEADER].tolist()
    return bool(num_ranks * squares == total * total)
