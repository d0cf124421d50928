"""The momentum of each worker of this rank."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_sgd.functional.robust.robust_statistics import worker_momentum
from lightning_sgd.strategies._base.replica import GradientReplica


class WorkerMomentum:
    """One momentum per worker and optimizer; those of parameters and workers that are added later start at zero.

    Args:
        beta: Weight of the past [β].
    """

    def __init__(self, beta: float) -> None:
        self.beta = beta
        self._momenta: dict[int, Tensor] = {}

    def update(self, replica: GradientReplica, rows: Tensor) -> Tensor:
        """Update the momenta by the gradients of the workers, of shape (k, n⌈d/n⌉), and return them."""
        momentum = self._momenta.get(replica.index)
        if momentum is None or not _covers(momentum, rows):
            momentum = self._momenta[replica.index] = _grown(momentum, rows)
        # At the end of an epoch there may be fewer micro-batches; the momenta of the others wait.
        return worker_momentum(momentum[: len(rows)], rows, self.beta)

    def state_dict(self, replicas: list[GradientReplica]) -> dict[str, Any]:
        """Return the momenta by optimizer, without the padding, which depends on the number of ranks."""
        known = [replica for replica in replicas if replica.index in self._momenta]
        return {
            str(replica.index): self._momenta[replica.index][:, : replica.gradients.numel].clone()
            for replica in known
        }

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Restore :meth:`state_dict`."""
        self._momenta = {int(index): momentum.to(device) for index, momentum in state.items()}


def _covers(momentum: Tensor, rows: Tensor) -> bool:
    return len(momentum) >= len(rows) and momentum.shape[1] == rows.shape[1]


def _grown(momentum: Tensor | None, rows: Tensor) -> Tensor:
    grown = rows.new_zeros(max(len(rows), 0 if momentum is None else len(momentum)), rows.shape[1])
    if momentum is not None:
        columns = min(momentum.shape[1], grown.shape[1])
        grown[: len(momentum), :columns] = momentum[:, :columns]
    return grown
