"""Protocols of strategies, by which callbacks read them; strategies of other packages may implement them, too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor

from lightning_sgd.functional.distributed.traffic import Traffic


@runtime_checkable
class CountsTraffic(Protocol):
    """A strategy that counts its traffic."""

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
    """A strategy whose ranks may have different weights."""

    @property
    def replicas(self) -> Sequence[SharedReplica]:
        """One for each optimizer."""


class StepReport(Protocol):
    """The outcome of combining the gradients of all workers in one step."""

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
        """The report of the last step of each optimizer."""

    def request_distances(self, wanted: bool) -> None:
        """Measure in the steps from now on how far each worker's gradient is from the result, or stop to."""
