"""All-to-all communication: every rank sends another tensor to each of the others at the same time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_sgd.functional.distributed.traffic import all_reduce_traffic
from lightning_sgd.strategies._comm.collectives import Collectives, Purpose, place
from lightning_sgd.strategies._comm.failures import ExchangeError, describe_mismatch
from lightning_sgd.strategies._comm.fingerprints import short_hash
from lightning_sgd.strategies._comm.in_flight import InFlight, start_messages

DIRECT_BYTES = 2**14
"""Up to this size every rank sends to every rank; above it a ring, which sends less but takes more turns."""

METADATA_LENGTH = 5
"""Numbers that every rank sends to all others: purpose, step, layout, and two of the caller."""


class AllToAll(Collectives):
    """Adds the collectives of strategies that split a vector into one shard per rank.

    All ranks send to each other directly. No message waits for another one, whereas the collectives of gloo take one
    turn per rank.
    """

    @property
    def control_group(self) -> dist.ProcessGroup:
        """Group for CPU metadata; with gloo the payload's group, whose threads are already running."""
        is_gloo = dist.get_backend(self.group) == "gloo"
        group: dist.ProcessGroup = self.group if is_gloo else self.objects
        return group

    def all_to_all(
        self,
        send: Mapping[int, Tensor],
        receive: Mapping[int, Tensor],
        numbers: Sequence[int],
        purpose: Purpose,
        step: int,
        *,
        layout: int = 0,
    ) -> list[list[int]]:
        """Send each rank its tensor, after a check that all ranks are in the same exchange.

        The check compares metadata of one fixed size. A rank in another exchange is detected before any message of
        an unexpected size arrives.

        Args:
            send: Contiguous tensors by destination rank; this rank's own is copied.
            receive: Contiguous tensors by source rank.
            numbers: At most two integers, which are sent to all ranks.
            purpose: The same on all ranks.
            step: Optimizer steps so far; the same on all ranks.
            layout: Hash of the shapes of the tensors; the same on all ranks.

        Returns:
            For each rank its ``numbers``, padded with zeros to two.
        """
        # Padded to one size, so that metadata of two different exchanges can still be received and compared.
        mine = torch.tensor([purpose, step, layout, *numbers, 0, 0])[:METADATA_LENGTH]
        metadata = mine.repeat(self.num_ranks, 1)
        with self._timed(purpose, step):
            others = dict(enumerate(metadata))
            pending_metadata = self._start(self._to_others(mine), others, self.control_group, step)
            # The payload starts before the metadata are known, which saves a round trip. Its tag is of this exchange:
            # a payload of another one could be longer than the buffer that receives it.
            tag = 1 + short_hash(f"{purpose} {step} {layout}".encode()) % 2**30
            pending_payload = self._start(send, receive, self.group, step, tag)
            # Before the payload is waited for: that of a rank in another exchange would never come.
            self._finish(pending_metadata)
            self._check(metadata)
            self._finish(pending_payload)
        if self.rank in receive:
            receive[self.rank].copy_(send[self.rank])
        rows: list[list[int]] = metadata[:, METADATA_LENGTH - 2 :].tolist()
        return rows

    def all_gather(
        self, tensor: Tensor, purpose: Purpose, step: int, out: Tensor | None = None
    ) -> Tensor:
        """Gather a contiguous tensor of the same shape from every rank, stacked in order of rank (into ``out``)."""
        shape = self.num_ranks, *tensor.shape
        gathered = tensor.new_empty(shape) if out is None else out.view(shape)
        # Entries of this rank itself are not sent: `_start` passes over them.
        send, receive = dict.fromkeys(range(self.num_ranks), tensor), dict(enumerate(gathered))
        with self._timed(purpose, step):
            self._finish(self._start(send, receive, self.group, step))
        gathered[self.rank] = tensor
        return gathered

    def all_reduce_sum(self, values: Tensor, purpose: Purpose, step: int) -> Tensor:
        """Add up a small CPU tensor over the ranks; all ranks get the same bits."""
        if (self.num_ranks - 1) * values.nbytes <= DIRECT_BYTES:
            gathered = values.new_empty((self.num_ranks, *values.shape))
            gathered[self.rank] = values
            with self._timed(purpose, step):
                send, receive = self._to_others(values), dict(enumerate(gathered))
                self._finish(self._start(send, receive, self.control_group, step))
            # The order of addition is that of the ranks, on all of them.
            return gathered.sum(dim=0)
        with self._timed(purpose, step):
            dist.all_reduce(values, group=self.control_group)
            self._count(*all_reduce_traffic(values.nbytes, self.num_ranks))
        return values

    def broadcast_object(self, thing: Any, source: int) -> Any:
        """Send a container of CPU tensors from one rank to all."""
        things = [thing]
        # Not on the default group, where a collective of a metric may still be pending.
        dist.broadcast_object_list(things, src=source, group=self.objects)
        return things[0]

    def _to_others(self, tensor: Tensor) -> dict[int, Tensor]:
        return {peer: tensor for peer in range(self.num_ranks) if peer != self.rank}

    def _start(
        self,
        send: Mapping[int, Tensor],
        receive: Mapping[int, Tensor],
        group: dist.ProcessGroup,
        step: int,
        tag: int = 0,
    ) -> InFlight:
        # Each rank begins with its successor, so that not all send to rank 0 first.
        others = [(self.rank + shift) % self.num_ranks for shift in range(1, self.num_ranks)]
        outgoing = {peer: [send[peer]] for peer in others if peer in send}
        incoming = {peer: [receive[peer]] for peer in others if peer in receive}
        pending = InFlight(step=step)
        self._in_flight.append(pending)
        self.traffic.num_bytes += float(sum(tensor.nbytes for (tensor,) in outgoing.values()))
        self.traffic.num_messages += len(outgoing)
        pending.works = start_messages(outgoing, incoming, group, tag)
        return pending

    def _finish(self, pending: InFlight) -> None:
        pending.wait()
        self._in_flight.remove(pending)

    def _check(self, metadata: Tensor) -> None:
        # Every rank has the metadata of all, so if one raises, all do; only the first three must agree.
        if bool((metadata[:, :3] == metadata[self.rank, :3]).all()):
            return
        places = {rank: place(Purpose(p), at) for rank, (p, at, *_) in enumerate(metadata.tolist())}
        self.abort()
        if len(set(places.values())) > 1:
            raise ExchangeError(describe_mismatch(places))
        others = [r for r, row in enumerate(metadata) if row[2] != metadata[self.rank, 2]]
        raise ExchangeError(
            f"Rank {self.rank} has other parameters, in number, shape or order, or another number of micro-batches "
            f"than ranks {others}, in {places[self.rank]}. Build the same model on all ranks, unfreeze layers on all "
            "alike, and give all the same number of batches."
        )
