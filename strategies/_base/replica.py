"""What one optimizer trains, as one rank has it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_sgd.functional.distributed.flat_buffers import FlatBuffers, distance, unique
from lightning_sgd.functional.distributed.flat_gradients import FlatGradients
from lightning_sgd.strategies._comm.all_to_all import AllToAll
from lightning_sgd.strategies._comm.collectives import Purpose
from lightning_sgd.strategies._comm.fingerprints import layout, short_hash


class Replica:
    """The tensors that one optimizer trains, and where this rank is with them.

    Parameters that are added to the optimizer later, as when layers are unfrozen, take part from then on.

    Args:
        index: Position of the optimizer.
        optimizer: Trains the tensors.

    Attributes:
        num_steps: Optimizer steps so far, those that a GradScaler skipped included.
        num_since: Steps since the ranks last had the same weights.
        is_shared: Whether all ranks have the same weights now.
        loss: Of the last step, where its closure returned one.
        passengers: Small tensors that travel with the parameters whenever they are exchanged.
    """

    def __init__(self, index: int, optimizer: Optimizer) -> None:
        self.index, self.optimizer = index, optimizer
        self.num_steps, self.num_since = 0, 0
        self.is_shared = True
        self.loss: Tensor | None = None
        self.passengers: list[Tensor] = []
        self._flat: FlatBuffers | None = None

    @property
    def tensors(self) -> list[Tensor]:
        """The parameters, frozen or not, with a gradient or not: the same on all ranks."""
        groups = self.optimizer.param_groups
        params = [param for group in groups for param in group["params"]]
        return [
            param for param in unique(params) if param.is_floating_point() or param.is_complex()
        ]

    @property
    def flat(self) -> FlatBuffers:
        """The buffers that the parameters travel in, and with them the passengers."""
        tensors = [*self.tensors, *self.passengers]
        if self._flat is None or not self._flat.holds(tensors):
            self._flat = FlatBuffers(tensors)
        return self._flat

    @property
    def num_bytes(self) -> int:
        """Size of what travels."""
        return self.flat.num_bytes

    def step(self) -> None:
        """Count an optimizer step of this rank."""
        self.num_steps += 1
        self.num_since += 1
        self.is_shared = False

    def share(self) -> None:
        """Note that all ranks have the same weights now."""
        self.num_since, self.is_shared = 0, True

    def distance(self) -> Tensor:
        """How far the parameters are from what is in the buffers."""
        return distance(self.tensors, self.flat.views)

    def release(self) -> None:
        """Free the buffers until they are needed again."""
        self._flat = None

    def state_dict(self) -> dict[str, Any]:
        """Counts, and whether the weights were shared."""
        return {
            "num_steps": self.num_steps,
            "num_since": self.num_since,
            "is_shared": self.is_shared,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`.

        Args:
            state: What it returned.
        """
        self.num_steps, self.num_since = state["num_steps"], state["num_since"]
        self.is_shared = state["is_shared"]


def state_tensors(optimizer: Optimizer) -> list[Tensor]:
    """The optimizer state that can be averaged: what has the shape of its parameter.

    Args:
        optimizer: Of any kind.
    """
    return [
        value
        for group in optimizer.param_groups
        for param in group["params"]
        for key, value in sorted(optimizer.state.get(param, {}).items())
        if isinstance(value, Tensor) and value.is_floating_point() and value.shape == param.shape
    ]


def copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    """A copy of each.

    Args:
        tensors: On any devices.
    """
    return [tensor.detach().clone() for tensor in tensors]


@torch.no_grad()
def put_back(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Copy values back in place.

    Args:
        tensors: Where to.
        values: From :func:`copies`.
    """
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)


class GradientReplica(Replica):
    """The tensors that one optimizer trains, and the gradients that this rank has of them.

    Args:
        index: Position of the optimizer.
        optimizer: Trains the tensors.
        num_ranks: Into how many parts gradients are cut.
        names: Of the parameters, by identity.

    Attributes:
        num_absent: How many of this rank's rows in this step are no gradients.
    """

    def __init__(
        self, index: int, optimizer: Optimizer, num_ranks: int, names: Mapping[int, str]
    ) -> None:
        super().__init__(index, optimizer)
        self.num_ranks, self.names = num_ranks, names
        self.num_absent = 0
        self._gradients: FlatGradients | None = None
        self._layout = 0
        self._columns: Tensor | None = None
        self._result: Tensor | None = None

    @property
    def gradients(self) -> FlatGradients:
        """This rank's rows; made anew when parameters are added to the optimizer."""
        tensors = self.tensors
        if self._gradients is None or not self._gradients.holds(tensors):
            self._gradients = FlatGradients(tensors, self.num_ranks)
            self._columns = self._result = None
            self._layout = layout((self.names.get(id(tensor), "?"), tensor) for tensor in tensors)
        return self._gradients

    @property
    def num_bytes(self) -> int:
        """Size of one gradient."""
        return self.gradients.num_bytes

    def pack(self, factor: float, *, absent: bool) -> None:
        """Take the gradients as one more row.

        Args:
            factor: What they are multiplied by.
            absent: Whether there is no gradient at all.
        """
        self.num_absent += absent
        self.gradients.pack(factor, absent=absent)

    def clear(self) -> None:
        """Expect the gradients of another step."""
        self.num_absent = 0
        self.gradients.clear()

    def release(self) -> None:
        """Free the rows until they are needed again."""
        super().release()
        self._gradients, self._columns, self._result = None, None, None

    def scatter(self, exchange: AllToAll, rows: Tensor) -> tuple[Tensor, list[list[int]]]:
        """Give each rank its part of the columns of this rank's rows, and get this rank's part of all rows.

        Args:
            exchange: Between the ranks.
            rows: Of shape (k, n⌈d/n⌉).

        Returns:
            The part of this rank, of shape (nk, ⌈d/n⌉), rank by rank, and for each rank a number that stands for which
            parameters have a gradient, and how many of its rows are none.
        """
        gradients, n = self.gradients, exchange.num_ranks
        parts = rows.view(len(rows), n, gradients.shard_size).transpose(0, 1).contiguous()
        # Fresh memory of this size would cost as much as copying it.
        mine = self._columns = _like(parts, self._columns)
        words = exchange.trade(
            dict(enumerate(parts)),
            dict(enumerate(mine)),
            [short_hash(bytes(gradients.used)), self.num_absent],
            Purpose.GRADIENTS,
            self.num_steps,
            layout=short_hash(f"{self._layout} {len(rows)}".encode()),
        )
        return mine.flatten(0, 1), words

    def gather(self, exchange: AllToAll, shard: Tensor) -> Tensor:
        """The parts of all ranks, one after the other.

        Args:
            exchange: Between the ranks.
            shard: The part of this rank, of shape (⌈d/n⌉,).
        """
        whole = self._result = _like(self.gradients.rows[0], self._result)
        return exchange.gather_alike(shard, Purpose.GRADIENTS, self.num_steps, whole).flatten()

    def used_by(
        self, exchange: AllToAll, words: list[list[int]], is_used: Callable[[int], bool]
    ) -> list[bool]:
        """For each tensor, whether it gets a gradient.

        Args:
            exchange: Between the ranks.
            words: From :meth:`scatter`.
            is_used: Whether one does of which so many ranks have a gradient.
        """
        mine = self.gradients.used
        if len({number for number, _ in words}) == 1:
            return mine
        masks = torch.tensor(mine, dtype=torch.uint8, device=self.gradients.rows.device)
        counts = exchange.gather_alike(masks, Purpose.GRADIENTS, self.num_steps).sum(dim=0)
        return [is_used(int(count)) for count in counts]


def _like(tensor: Tensor, old: Tensor | None) -> Tensor:
    """Uninitialised memory; the old one if it fits."""
    fits = old is not None and old.shape == tensor.shape and old.dtype == tensor.dtype
    return old if old is not None and fits else torch.empty_like(tensor)
