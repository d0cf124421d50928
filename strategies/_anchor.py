"""The anchor of one replica: the mean of the models one round ago, and the mean that is on its way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_sgd.functional.distributed.flat_buffers import FlatBuffers, distance
from lightning_sgd.functional.distributed.overlap_local_sgd import (
    move_anchor_,
    pull_back_,
    velocity_scale,
)
from lightning_sgd.strategies._base.replica import Replica
from lightning_sgd.strategies._comm.collectives import Collectives, Purpose
from lightning_sgd.strategies._comm.in_flight import PendingMean


class Anchor:
    """Pulls a replica back, and starts the exchange that is waited for one round later.

    Args:
        exchange: Between the ranks.
        replica: What one optimizer trains.
        pullback: Share of the way back to the anchor [α].
        momentum: Of the anchor [β].
        scales_with_lr: Whether the velocity stays in proportion to the step size.
    """

    def __init__(
        self,
        exchange: Collectives,
        replica: Replica,
        pullback: float,
        momentum: float,
        *,
        scales_with_lr: bool,
    ) -> None:
        self.exchange, self.replica = exchange, replica
        self.pullback, self.momentum, self.scales_with_lr = pullback, momentum, scales_with_lr
        self.place: FlatBuffers | None = None
        self.velocity = self.travelling = FlatBuffers([])
        self.moved: Tensor | None = None
        self._lr, self._scale = 0.0, 1.0
        self._pending: PendingMean | None = None

    def settle(self) -> None:
        """Take the parameters as they are for the anchor, those that have none yet."""
        tensors = self.replica.tensors
        if self.place is not None and self.place.holds(tensors):
            return
        self.arrive()
        old = (self.place, self.velocity) if self.place is not None else ()
        self.place, self.velocity = FlatBuffers(tensors), FlatBuffers(tensors)
        self.travelling = FlatBuffers(tensors)
        self.place.pack()
        for before, after in zip(old, (self.place, self.velocity), strict=False):
            _carry_over(before, after)

    def cross(self) -> None:
        """At a boundary: pull the parameters back, and let them begin to travel."""
        self.settle()
        self.arrive()
        assert self.place is not None
        self.moved = distance(self.replica.tensors, self.place.views)
        self.travelling.pack()
        for model, anchor in zip(self.travelling.buffers, self.place.buffers, strict=True):
            pull_back_(model, anchor, self.pullback)
        self.travelling.unpack()
        self._take_lr()
        self._pending = self.exchange.start_mean(self.travelling, self.replica.num_steps)

    def arrive(self) -> None:
        """Wait for the mean that is on its way, and move the anchor; nothing of it is seen before the next boundary."""
        if self._pending is None or self.place is None:
            return
        pending, self._pending = self._pending, None
        self.exchange.finish_mean(pending)
        parts = (self.place.buffers, self.velocity.buffers, self.travelling.buffers)
        for anchor, velocity, mean in zip(*parts, strict=True):
            move_anchor_(anchor, velocity, mean, self.momentum * self._scale)

    def _take_lr(self) -> None:
        # Of the boundary where the exchange starts: when it is waited for depends on validation and checkpoints.
        lr = float(self.replica.optimizer.param_groups[0]["lr"])
        self._scale = velocity_scale(lr, self._lr) if self.scales_with_lr else 1.0
        self._lr = lr

    def state_dict(self) -> dict[str, Any]:
        """Anchor and velocity, which are the same on all ranks and so kept by rank 0 alone, and the step size."""
        has_anchor = self.place is not None
        state: dict[str, Any] = {"lr": self._lr, "has_anchor": has_anchor}
        if self.place is not None and self.exchange.rank == 0:
            state |= {"anchor": self.place.buffers, "velocity": self.velocity.buffers}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`; on all ranks alike.

        Args:
            state: What it returned on this rank.
        """
        self._lr = state["lr"]
        if not state["has_anchor"]:
            return
        self.settle()
        assert self.place is not None
        for key, flat in (("anchor", self.place), ("velocity", self.velocity)):
            if key in state:
                _fill(flat, state[key])
            self.exchange.broadcast(flat, Purpose.STATE, self.replica.num_steps)


@torch.no_grad()
def _carry_over(before: FlatBuffers, after: FlatBuffers) -> None:
    places = {id(tensor): view for tensor, view in zip(after.tensors, after.views, strict=True)}
    for tensor, view in zip(before.tensors, before.views, strict=True):
        if id(tensor) in places:
            places[id(tensor)].copy_(view)


@torch.no_grad()
def _fill(flat: FlatBuffers, buffers: list[Tensor]) -> None:
    for buffer, saved in zip(flat.buffers, buffers, strict=True):
        buffer.copy_(saved)
