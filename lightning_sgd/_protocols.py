"""What strategies offer to callbacks; any strategy that has these attributes will do, also one of another package."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor

from lightning_sgd.functional.distributed.traffic import Traffic


@runtime_checkable
class CountsTraffic(Protocol):
    """Counts what it sends."""

    @property
    def traffic(self) -> Traffic | None:
        """Bytes, messages and seconds of this rank since the start of the training; ``None`` on one rank."""


class SharedReplica(Protocol):
    """Weights that one optimizer trains."""

    @property
    def is_shared(self) -> bool:
        """Whether all ranks have the same weights."""


@runtime_checkable
class HasReplicas(Protocol):
    """Has weights on every rank that need not be equal."""

    @property
    def replicas(self) -> Sequence[SharedReplica]:
        """One for each optimizer."""


class StepReport(Protocol):
    """What was made of the gradients of all workers in one step."""

    step: int | None
    num_workers: int
    weights: Tensor | None
    dropped: tuple[int, ...]
    absent: tuple[int, ...]
    distances: Tensor | None


@runtime_checkable
class ReportsAggregation(Protocol):
    """Combines gradients of several workers, and says how."""

    @property
    def reports(self) -> Sequence[StepReport]:
        """Of the last step of each optimizer."""

    def request_distances(self, wanted: bool) -> None:
        """Measure in the steps from now on how far each worker's gradient is from the result, or stop to."""
