"""Messages from every rank to every other at the same time, each rank getting something else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_sgd.functional.distributed.traffic import all_reduce_traffic, send_traffic
from lightning_sgd.strategies._comm.collectives import Collectives, Purpose, place
from lightning_sgd.strategies._comm.failures import ExchangeError, different_places
from lightning_sgd.strategies._comm.fingerprints import short_hash
from lightning_sgd.strategies._comm.in_flight import InFlight, start_letters

DIRECT_BYTES = 2**14
"""Up to so many bytes, everybody sends to everybody instead of reducing in a ring, which takes more turns."""


LETTER = 5
"""Length of a letter: purpose, step, layout and two words."""


class AllToAll(Collectives):
    """Adds what strategies need that cut a vector into as many parts as there are ranks.

    All ranks send to each other at once: no message waits for another one, while the collectives of gloo take a turn
    for every rank.
    """

    @property
    def letters(self) -> dist.ProcessGroup:
        """For small things on the CPU: where gloo carries the goods too, the same group, whose threads are awake."""
        is_gloo = dist.get_backend(self.group) == "gloo"
        group: dist.ProcessGroup = self.group if is_gloo else self.objects
        return group

    def trade(
        self,
        send: Mapping[int, Tensor],
        receive: Mapping[int, Tensor],
        words: Sequence[int],
        purpose: Purpose,
        step: int,
        *,
        layout: int = 0,
    ) -> list[list[int]]:
        """Send other things to each rank, and find out whether all ranks are in the same trade.

        The words travel in letters of one size, so that a rank that is elsewhere is found out before anything of
        another size arrives.

        Args:
            send: By rank, what it gets; contiguous. This rank's own is copied.
            receive: By rank, where to put what it sends; contiguous.
            words: At most two integers that every rank tells all others.
            purpose: What this is for.
            step: Optimizer steps so far; the same on all ranks.
            layout: A number that stands for the shapes of what is sent; the same on all ranks.

        Returns:
            The words of every rank.
        """
        letter = torch.tensor([purpose, step, layout, *words, 0, 0])[:LETTER]
        letters = letter.repeat(self.num_ranks, 1)
        with self._timed(purpose, step):
            others = dict(enumerate(letters))
            talk = self._start(self._to_others(letter), others, self.letters, step)
            # Under a number of their own: goods of another trade could be longer than there is room for.
            number = 1 + short_hash(f"{purpose} {step} {layout}".encode()) % 2**30
            goods = self._start(send, receive, self.group, step, number)
            self._finish(talk)
            self._check(letters)
            self._finish(goods)
        if self.rank in receive:
            receive[self.rank].copy_(send[self.rank])
        rows: list[list[int]] = letters[:, LETTER - 2 :].tolist()
        return rows

    def gather_alike(
        self, tensor: Tensor, purpose: Purpose, step: int, into: Tensor | None = None
    ) -> Tensor:
        """Every rank's tensor on every rank, in one more dimension at the front.

        Args:
            tensor: Of one shape and type on all ranks; contiguous.
            purpose: What this is for.
            step: Optimizer steps so far; the same on all ranks.
            into: Where to put them.
        """
        shape = self.num_ranks, *tensor.shape
        everybody = tensor.new_empty(shape) if into is None else into.view(shape)
        send, receive = dict.fromkeys(range(self.num_ranks), tensor), dict(enumerate(everybody))
        with self._timed(purpose, step):
            self._finish(self._start(send, receive, self.group, step))
        everybody[self.rank] = tensor
        return everybody

    def total(self, values: Tensor, purpose: Purpose, step: int) -> Tensor:
        """The sum over the ranks of a small tensor on the CPU; all ranks get the same bits.

        Args:
            values: Of one shape and type on all ranks.
            purpose: What this is for.
            step: Optimizer steps so far; the same on all ranks.
        """
        if (self.num_ranks - 1) * values.nbytes <= DIRECT_BYTES:
            everybody = values.new_empty((self.num_ranks, *values.shape))
            everybody[self.rank] = values
            with self._timed(purpose, step):
                receive = dict(enumerate(everybody))
                self._finish(self._start(self._to_others(values), receive, self.letters, step))
            return everybody.sum(dim=0)
        with self._timed(purpose, step):
            dist.all_reduce(values, group=self.letters)
            self._count(*all_reduce_traffic(values.nbytes, self.num_ranks))
        return values

    def broadcast_object(self, thing: Any, source: int) -> Any:
        """Bring plain containers of CPU tensors from one rank to all.

        Args:
            thing: That rank's.
            source: Which rank.
        """
        things = [thing]
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
        number: int = 0,
    ) -> InFlight:
        others = [(self.rank + shift) % self.num_ranks for shift in range(1, self.num_ranks)]
        outgoing = {peer: [send[peer]] for peer in others if peer in send}
        incoming = {peer: [receive[peer]] for peer in others if peer in receive}
        flight = InFlight(step=step)
        self._in_flight.append(flight)
        for (tensor,) in outgoing.values():
            self._count(*send_traffic(tensor.nbytes, 1))
        flight.works = start_letters(outgoing, incoming, group, number)
        return flight

    def _finish(self, flight: InFlight) -> None:
        flight.wait()
        self._in_flight.remove(flight)

    def _check(self, letters: Tensor) -> None:
        if bool((letters[:, :3] == letters[self.rank, :3]).all()):
            return
        places = {rank: place(Purpose(p), at) for rank, (p, at, *_) in enumerate(letters.tolist())}
        self.hang_up()
        if len(set(places.values())) > 1:
            raise ExchangeError(different_places(places))
        others = [r for r, row in enumerate(letters) if row[2] != letters[self.rank, 2]]
        raise ExchangeError(
            f"Rank {self.rank} has other parameters, in number, shape or order, or another number of micro-batches "
            f"than ranks {others}, in {places[self.rank]}. Build the same model on all ranks, unfreeze layers on all "
            "alike, and give all the same number of batches."
        )
