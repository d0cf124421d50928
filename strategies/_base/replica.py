"""What one optimizer trains, as one rank has it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_sgd.functional.distributed.flat_buffers import FlatBuffers, distance, unique


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
