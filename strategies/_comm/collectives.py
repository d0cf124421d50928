"""Collectives of our own: counted, timed, checked to be the same one on every rank."""

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
    RollCall,
    different_places,
    is_failed_exchange,
)
from lightning_sgd.strategies._comm.in_flight import InFlight, PendingMean, Swap, start_messages

if TYPE_CHECKING:
    from datetime import timedelta


class Purpose(IntEnum):
    """What an exchange is for; part of what all ranks must agree on."""

    GRADIENTS = 0
    ROUND = 1
    CONSENSUS = 2
    STATE = 3
    GOSSIP = 4
    ANCHOR = 5
    WEIGHTS = 6
    AUDIT = 7


NUM_TAGS = 61
"""Tags are small enough that sums of their squares are exact in float32 for thousands of ranks."""

HANG_UP_SECONDS = 2.0
"""How long to wait for what is in flight when a rank fails; the end of its process closes the rest."""


class Collectives:
    r"""Collectives on process groups of our own, so that those of metrics and Lightning never queue behind them.

    Every message carries a tag of its purpose and step in two elements, t and t², summed like the rest. By the
    inequality of Cauchy and Schwarz :math:`n\sum t^2 = (\sum t)^2` only if all tags are equal: a rank that has run
    out of data, say, is found out instead of having its consensus added to somebody's step.

    Messages between neighbours carry the same tag, and whoever gets one compares it with its own.

    Args:
        timeout: How long a rank waits for the others.
        in_background: Whether exchanges will go on while others do, for which they get a group of their own.
    """

    def __init__(self, timeout: timedelta | None, *, in_background: bool = False) -> None:
        self.rank, self.num_ranks = dist.get_rank(), dist.get_world_size()
        self.traffic = Traffic()
        self._in_flight: list[InFlight] = []
        self.world = dist.group.WORLD
        self.group = dist.new_group(timeout=timeout)
        self.background = dist.new_group(timeout=timeout) if in_background else self.group
        # Objects travel on the CPU, whatever the backend of tensors is.
        self.objects = dist.new_group(timeout=timeout, backend="gloo")
        self.roll_call = RollCall(self.rank, self.num_ranks, _get_default_store())

    @property
    def is_valid(self) -> bool:
        """Whether the process group that this was made in still exists."""
        return dist.is_initialized() and dist.group.WORLD is getattr(self, "world", None)

    def mean(self, flat: FlatBuffers, purpose: Purpose, step: int) -> None:
        """Replace what is in the buffers by its mean over the ranks; all ranks get the same bits.

        Args:
            flat: Packed.
            purpose: What this is for.
            step: Optimizer steps so far; the same on all ranks.
        """
        tag = _tag(purpose, step)
        with self._timed(purpose, step):
            for buffer in flat.buffers:
                _stamp(buffer, tag)
                dist.all_reduce(buffer, group=self.group)
                self._count(*all_reduce_traffic(buffer.nbytes, self.num_ranks))
                if not _is_stamped_alike(buffer, self.num_ranks):
                    self._raise_mismatch(purpose, step)
                buffer.div_(self.num_ranks)

    def start_mean(self, flat: FlatBuffers, step: int) -> PendingMean:
        """Begin to replace what is in the buffers by its mean over the ranks, without waiting.

        Args:
            flat: Packed; to be left alone until :meth:`finish_mean`.
            step: Optimizer steps so far; the same on all ranks.
        """
        pending = PendingMean(flat=flat, step=step)
        with self._timed(Purpose.ANCHOR, step):
            for buffer in flat.buffers:
                _stamp(buffer, _tag(Purpose.ANCHOR, step))
                work = dist.all_reduce(buffer, group=self.background, async_op=True)
                pending.works.append(work)
                self._count(*all_reduce_traffic(buffer.nbytes, self.num_ranks))
        self._in_flight.append(pending)
        return pending

    def finish_mean(self, pending: PendingMean) -> None:
        """Wait until the mean is there; all ranks get the same bits.

        Args:
            pending: In flight.
        """
        self._in_flight.remove(pending)
        with self._timed(Purpose.ANCHOR, pending.step):
            pending.wait()
        for buffer in pending.flat.buffers:
            if not _is_stamped_alike(buffer, self.num_ranks):
                self._raise_mismatch(Purpose.ANCHOR, pending.step)
            buffer.div_(self.num_ranks)

    def start_swap(
        self,
        outgoing: Sequence[Tensor],
        send: Sequence[int],
        receive: Mapping[int, Sequence[Tensor]],
        step: int,
    ) -> Swap:
        """Send buffers to some ranks and receive as many from others, without waiting.

        Args:
            outgoing: To be left alone until they have arrived.
            send: To whom.
            receive: From whom, and where to.
            step: Optimizer steps so far; the same on all ranks.
        """
        swap = Swap(receive=receive, step=step)
        with self._timed(Purpose.GOSSIP, step):
            for buffer in outgoing:
                _stamp(buffer, _tag(Purpose.GOSSIP, step))
                self._count(*send_traffic(buffer.nbytes, len(send)))
            swap.works = start_messages(outgoing, send, receive, self.background)
        self._in_flight.append(swap)
        return swap

    def finish_swap(self, swap: Swap) -> None:
        """Wait until everything has arrived, here and there.

        Args:
            swap: In flight.
        """
        self._in_flight.remove(swap)
        with self._timed(Purpose.GOSSIP, swap.step):
            swap.wait()
        for peer, buffers in swap.receive.items():
            if any(int(buffer[0]) != _tag(Purpose.GOSSIP, swap.step) for buffer in buffers):
                self._raise_stray(peer, swap.step)

    def broadcast(self, flat: FlatBuffers, purpose: Purpose, step: int) -> None:
        """Replace what is in the buffers by what rank 0 has in them.

        Args:
            flat: Packed.
            purpose: What this is for.
            step: Optimizer steps so far; the same on all ranks.
        """
        with self._timed(purpose, step):
            for buffer in flat.buffers:
                dist.broadcast(buffer, src=0, group=self.group)
                self._count(*broadcast_traffic(buffer.nbytes, self.num_ranks))

    def agree(self, value: int, step: int) -> bool:
        """Whether all ranks have the same number.

        Args:
            value: This rank's.
            step: Optimizer steps so far, for the message if a rank fails.
        """
        extremes = torch.tensor([value, -value])
        with self._timed(Purpose.STATE, step):
            dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=self.objects)
            self._count(*all_reduce_traffic(extremes.nbytes, self.num_ranks))
        return bool(extremes[0] == -extremes[1])

    def gather(self, thing: Any, step: int) -> list[Any] | None:
        """Bring plain containers of CPU tensors to rank 0, which gets a list by rank; the others ``None``.

        Args:
            thing: This rank's.
            step: Optimizer steps so far, for the message if a rank fails.
        """
        things = [None] * self.num_ranks if self.rank == 0 else None
        with self._timed(Purpose.STATE, step):
            dist.gather_object(thing, things, dst=0, group=self.objects)
        return things

    def gather_everywhere(self, thing: Any) -> list[Any]:
        """Bring small things to every rank, in a list by rank.

        Args:
            thing: This rank's.
        """
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
        traceback.clear_frames(error.__traceback__)  # they hold on to the group
        self.hang_up()
        return f"Rank {self.rank} could not finish the exchange of {where}. {self.roll_call.take(where)}"

    def hang_up(self) -> None:
        """Close all connections, so that ranks that wait for this one learn of its failure at once."""
        for exchange in self._in_flight:
            exchange.works.clear()
        kept = [self.__dict__.pop("background", None)] if self._in_flight else []
        for name in ("group", "background", "objects", "world"):
            self.__dict__.pop(name, None)
        with suppress(Exception):
            dist.destroy_process_group()
        # A group closes only when what is in flight in it has arrived or timed out, and whoever closes it waits.
        closing = Thread(target=kept.clear, daemon=True)
        closing.start()
        closing.join(HANG_UP_SECONDS)

    def _raise_stray(self, peer: int, step: int) -> None:
        where = place(Purpose.GOSSIP, step)
        self.hang_up()
        said = self.roll_call.take(where)
        raise ExchangeError(
            f"Rank {self.rank} is in the exchange of {where}, but rank {peer} sent it a message of another one. {said}"
        )

    def _raise_mismatch(self, purpose: Purpose, step: int) -> None:
        places = self.gather_everywhere(place(purpose, step))
        raise ExchangeError(different_places(dict(enumerate(places))))


def place(purpose: Purpose, step: int) -> str:
    """Where a rank is, in words.

    Args:
        purpose: Of the exchange.
        step: Optimizer steps so far.
    """
    return f"{purpose.name.lower()} after step {step}"


def _tag(purpose: Purpose, step: int) -> int:
    return (len(Purpose) * step + purpose) % NUM_TAGS


def _stamp(buffer: Tensor, tag: int) -> None:
    buffer[:HEADER] = torch.tensor([tag, tag * tag], dtype=buffer.dtype)


def _is_stamped_alike(buffer: Tensor, num_ranks: int) -> bool:
    total, squares = buffer[:HEADER].tolist()
    return bool(num_ranks * squares == total * total)
