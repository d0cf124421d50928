"""Rounds of gossip: a replica is mixed with those of its neighbours in a graph, at once or in the background."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_sgd.functional.distributed.flat_buffers import FlatBuffers
from lightning_sgd.functional.distributed.gossip_pga import weighted_differences
from lightning_sgd.functional.distributed.mixing import Mixing
from lightning_sgd.strategies._base.replica import Replica
from lightning_sgd.strategies._comm.collectives import Collectives
from lightning_sgd.strategies._comm.in_flight import Swap


class Mixer:
    """Mixes one replica; in the background if the training goes on between :meth:`start` and :meth:`finish`.

    Args:
        exchange: Between the ranks.
        mixing: Who sends what to whom.
        replica: What one optimizer trains.
        wire_dtype: Type in which numbers are sent; ``None`` for that in which they are added.

    Attributes:
        num_rounds: Rounds so far, which a graph that changes goes by.
    """

    def __init__(
        self,
        exchange: Collectives,
        mixing: Mixing,
        replica: Replica,
        wire_dtype: torch.dtype | None,
    ) -> None:
        self.exchange, self.mixing, self.replica = exchange, mixing, replica
        self.wire_dtype = wire_dtype
        self.num_rounds = 0
        self._flat: FlatBuffers | None = None
        self._swap: Swap | None = None
        self._weights: list[float] = []
        self._outgoing: list[Tensor] = []
        self._incoming: list[list[Tensor]] = []
        self._change: list[Tensor] | None = None

    def start(self) -> None:
        """Send the parameters as they are now to the neighbours of this round."""
        rank, number = self.exchange.rank, self.num_rounds
        self._flat = self.replica.flat
        self._flat.pack()
        self._outgoing = self._copied(self._flat.buffers)
        receive = self.mixing.receive(rank, number)
        self._weights = list(receive.values())
        self._swap = self.exchange.start_swap(
            self._outgoing,
            self.mixing.send(rank, number),
            dict(zip(receive, self._places(len(receive)), strict=True)),
            self.replica.num_steps,
        )
        self.num_rounds += 1

    def arrive(self) -> None:
        """Wait for the round that is in flight; the parameters stay as they are."""
        if self._swap is None or self._flat is None:
            return
        self.exchange.finish_swap(self._swap)
        received = list(self._swap.receive.values())
        self._swap = None
        self._change = [
            weighted_differences(sent, [each[i] for each in received], self._weights, buffer.dtype)
            for i, (sent, buffer) in enumerate(zip(self._outgoing, self._flat.buffers, strict=True))
        ]

    def finish(self) -> None:
        """Wait for the round that is in flight, if one is, and add what it changes to the parameters."""
        self.arrive()
        if self._change is None or self._flat is None:
            return
        self._flat.pack()
        for buffer, change in zip(self._flat.buffers, self._change, strict=True):
            buffer.add_(change)
        self._flat.unpack()
        self._change = None

    def state_dict(self) -> dict[str, Any]:
        """Number of rounds, and what a round that has arrived is going to change."""
        return {"num_rounds": self.num_rounds, "change": self._change}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`.

        Args:
            state: What it returned.
        """
        self.num_rounds, self._flat = state["num_rounds"], self.replica.flat
        if state["change"] is not None:
            pairs = zip(state["change"], self._flat.buffers, strict=True)
            self._change = [change.to(buffer.device) for change, buffer in pairs]

    def _copied(self, buffers: Sequence[Tensor]) -> list[Tensor]:
        """A copy of our own, because a global average may go on in the buffers meanwhile."""
        if not _fit(self._outgoing, buffers):
            self._outgoing = self._like(buffers)
        for outgoing, buffer in zip(self._outgoing, buffers, strict=True):
            outgoing.copy_(buffer)
        return self._outgoing

    def _places(self, num_peers: int) -> list[list[Tensor]]:
        self._incoming = [each for each in self._incoming if _fit(each, self._outgoing)]
        while len(self._incoming) < num_peers:
            self._incoming.append(self._like(self._outgoing))
        return self._incoming[:num_peers]

    def _like(self, buffers: Sequence[Tensor]) -> list[Tensor]:
        return [
            torch.empty_like(buffer, dtype=self.wire_dtype or buffer.dtype) for buffer in buffers
        ]


def _fit(buffers: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    shapes = [(tensor.shape, tensor.device) for tensor in buffers]
    return shapes == [(tensor.shape, tensor.device) for tensor in others]
