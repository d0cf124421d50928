"""The parameters of one optimizer on one rank, and the gradients of this rank's workers."""

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
    """The parameters of one optimizer, with counts of steps.

    Parameters that are added to the optimizer later, as when layers are unfrozen, are included from then on.

    Args:
        index: Position of the optimizer.
        optimizer: Its parameters make the replica.

    Attributes:
        num_steps: Optimizer steps so far, including those that a GradScaler skipped.
        num_since: Steps since the ranks last had the same weights.
        is_shared: Whether all ranks have the same weights.
        loss: Loss of the last step, if its closure returned one.
        extra_tensors: Small tensors that are exchanged together with the parameters.
    """

    def __init__(self, index: int, optimizer: Optimizer) -> None:
        self.index, self.optimizer = index, optimizer
        self.num_steps, self.num_since = 0, 0
        self.is_shared = True
        self.loss: Tensor | None = None
        self.extra_tensors: list[Tensor] = []
        self._params: list[Tensor] = []  # as they are listed in the optimizer
        self._tensors: list[Tensor] = []
        self._flat: FlatBuffers | None = None

    @property
    def tensors(self) -> list[Tensor]:
        """The floating-point parameters, frozen or not, with a gradient or not: the same on all ranks."""
        params = [param for group in self.optimizer.param_groups for param in group["params"]]
        # Identities, because `==` compares elements. The old list keeps its tensors alive, so that none is reused.
        if list(map(id, params)) != list(map(id, self._params)):
            self._params = params
            self._tensors = [p for p in unique(params) if p.is_floating_point() or p.is_complex()]
        return self._tensors

    @property
    def flat(self) -> FlatBuffers:
        """The buffers in which parameters and extra tensors are exchanged."""
        tensors = [*self.tensors, *self.extra_tensors]
        if self._flat is None or not self._flat.holds(tensors):
            self._flat = FlatBuffers(tensors)
        return self._flat

    @property
    def num_bytes(self) -> int:
        """Size of one exchange."""
        return self.flat.num_bytes

    def step(self) -> None:
        """Count an optimizer step of this rank."""
        self.num_steps += 1
        self.num_since += 1
        self.is_shared = False

    def share(self) -> None:
        """Record that all ranks have the same weights."""
        self.num_since, self.is_shared = 0, True

    def distance(self) -> Tensor:
        """Return the distance of the parameters from the contents of the buffers."""
        return distance(self.tensors, self.flat.views)

    def release(self) -> None:
        """Free the buffers until they are needed again."""
        self._flat = None

    def state_dict(self) -> dict[str, Any]:
        """Return the counts."""
        return {
            "num_steps": self.num_steps,
            "num_since": self.num_since,
            "is_shared": self.is_shared,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the counts."""
        self.num_steps, self.num_since = state["num_steps"], state["num_since"]
        self.is_shared = state["is_shared"]


class GradientReplica(Replica):
    """The parameters of one optimizer, and the gradients of this rank's workers as rows of a matrix.

    Args:
        index: Position of the optimizer.
        optimizer: Its parameters make the replica.
        num_ranks: Number of shards of a row.
        names: Names of the parameters by ``id``.

    Attributes:
        num_absent: Number of this rank's rows in this step that are no gradients.
    """

    def __init__(
        self, index: int, optimizer: Optimizer, num_ranks: int, names: Mapping[int, str]
    ) -> None:
        super().__init__(index, optimizer)
        self.num_ranks, self.names = num_ranks, names
        self.num_absent = 0
        self._gradients: FlatGradients | None = None
        self._resolved: list[Tensor] = []
        self._layout = 0
        self._columns: Tensor | None = None
        self._result: Tensor | None = None

    @property
    def gradients(self) -> FlatGradients:
        """This rank's rows, of the parameters that the optimizer had when the step began."""
        return self.resolve() if self._gradients is None else self._gradients

    def resolve(self) -> FlatGradients:
        """Look up the parameters, once per step, and make new rows if they have changed."""
        tensors = self.tensors
        if self._gradients is None or tensors is not self._resolved:
            self._gradients, self._resolved = FlatGradients(tensors, self.num_ranks), tensors
            self._columns = self._result = None
            self._layout = layout((self.names.get(id(tensor), "?"), tensor) for tensor in tensors)
        return self._gradients

    @property
    def num_bytes(self) -> int:
        """Size of one gradient."""
        return self.gradients.num_bytes

    def pack(self, factor: float, *, absent: bool) -> None:
        """Copy the gradients, times ``factor``, into the next row; NaN if there is no gradient at all."""
        is_first = self._gradients is None or self._gradients.num_packed == 0
        gradients = self.resolve() if is_first else self.gradients
        self.num_absent += absent
        gradients.pack(factor, absent=absent)

    def clear(self) -> None:
        """Start the next step without rows."""
        self.num_absent = 0
        self.gradients.clear()

    def release(self) -> None:
        """Free the rows until they are needed again."""
        super().release()
        self._gradients, self._columns, self._result = None, None, None

    def scatter(self, exchange: AllToAll, rows: Tensor) -> tuple[Tensor, list[list[int]]]:
        """Send to each rank its shard of this rank's rows.

        Args:
            exchange: Connects all ranks, which must call this together.
            rows: Tensor of shape (k, n⌈d/n⌉) for k workers on this rank, n ranks and d parameters.

        Returns:
            This rank's shard of the rows of all workers, of shape (nk, ⌈d/n⌉), rank by rank; and for each rank a hash
            of which parameters have a gradient, and the number of its rows that are no gradients.
        """
        gradients, n = self.gradients, exchange.num_ranks
        parts = rows.view(len(rows), n, gradients.shard_size).transpose(0, 1).contiguous()
        # Reused, because fresh memory of this size would cost as much as copying it.
        columns = self._columns = _like(parts, self._columns)
        metadata = exchange.all_to_all(
            dict(enumerate(parts)),
            dict(enumerate(columns)),
            [short_hash(bytes(gradients.used)), self.num_absent],
            Purpose.GRADIENTS,
            self.num_steps,
            layout=short_hash(f"{self._layout} {len(rows)}".encode()),
        )
        return columns.flatten(0, 1), metadata

    def gather(self, exchange: AllToAll, shard: Tensor) -> Tensor:
        """Concatenate the shards of all ranks, each of shape (⌈d/n⌉,)."""
        whole = self._result = _like(self.gradients.rows[0], self._result)
        return exchange.all_gather(shard, Purpose.GRADIENTS, self.num_steps, whole).flatten()

    def used_by(
        self, exchange: AllToAll, metadata: list[list[int]], is_enough: Callable[[int], bool]
    ) -> list[bool]:
        """Decide for each parameter whether it gets a gradient.

        Args:
            exchange: Connects all ranks, which must call this together.
            metadata: From :meth:`scatter`.
            is_enough: Maps the number of ranks that have a gradient of a parameter to the decision.
        """
        mine = self.gradients.used
        # In nearly all steps the hashes are equal, and no mask is exchanged.
        if len({used for used, _ in metadata}) == 1:
            return mine
        masks = torch.tensor(mine, dtype=torch.uint8, device=self.gradients.rows.device)
        counts = exchange.all_gather(masks, Purpose.GRADIENTS, self.num_steps).sum(dim=0)
        return [is_enough(int(count)) for count in counts]


def state_tensors(optimizer: Optimizer) -> list[Tensor]:
    """List the optimizer state that can be averaged: floating-point tensors of the shape of their parameter."""
    return [
        value
        for group in optimizer.param_groups
        for param in group["params"]
        for key, value in sorted(optimizer.state.get(param, {}).items())
        if isinstance(value, Tensor) and value.is_floating_point() and value.shape == param.shape
    ]


def clone_all(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Clone each tensor without its graph."""
    return [tensor.detach().clone() for tensor in tensors]


@torch.no_grad()
def copy_all_(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Copy values into tensors, in place."""
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)


def _like(tensor: Tensor, old: Tensor | None) -> Tensor:
    """Return uninitialised memory of the same shape and type; the old one if it fits."""
    fits = old is not None and old.shape == tensor.shape and old.dtype == tensor.dtype
    return old if old is not None and fits else torch.empty_like(tensor)
