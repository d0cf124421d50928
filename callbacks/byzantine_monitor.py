"""Monitor which workers a robust rule rejects."""

from __future__ import annotations

import math
import socket
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, ClassVar

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_sgd._distributed import gather_texts
from lightning_sgd._protocols import ReportsAggregation, StepReport
from lightning_sgd._validation import expect
from lightning_sgd.callbacks._monitoring.monitor import Monitor
from lightning_sgd.functional.robust.rejections import RejectionTally, by_rank, rejected

WORTH_NAMING = 0.1
"""A worker that was rejected in at least this share of the steps is named in the end message."""


class ByzantineMonitor(Monitor):
    """Log how ``ByzantineStrategy`` treats the gradient of each rank, and name the rank that it keeps rejecting.

    Workers are the ranks, ``rank_0`` and so on, or the micro-batches of one device, ``micro_batch_0`` and so on.

    .. list-table::
        :header-rows: 1

        * - key
          - meaning
        * - ``byzantine/weight/<worker>``
          - its share in the last gradient; NaN for rules without weights
        * - ``byzantine/distance/<worker>``
          - distance of its gradient from the gradient that was used
        * - ``byzantine/rejected/<worker>``
          - share of the last ``horizon`` steps in which it was rejected
        * - ``byzantine/num_rejected``
          - workers that were rejected in the last step

    A worker is rejected if its gradient was dropped as not finite or far too long, or got less than a tenth of the
    median weight. For rules without weights, and for rules such as Krum that give most workers none, it is rejected if
    its distance is more than three times the median; then only the steps before a look count, because distances are
    measured there alone.

    A rank that was rejected in ``alarm_share`` of the last ``horizon`` steps, and at least twice as often as the median
    rank, is named once in a warning, with its host. Other strategies report nothing, and NaN is logged.

    Cost: distances take one pass over the gradients before each look, and an exchange of n numbers; the rest costs
    nothing. Training is not changed, to the last bit.

    Args:
        every_n_steps: Look after so many optimizer steps; by default after every 50.
        every_n_epochs: Look after so many epochs; instead of ``every_n_steps``.
        alarm_share: Share of steps from which on a rank is named; null never does.
        horizon: Number of last steps over which rejections are counted.
        max_overhead: Largest share of the training time for looking, which the interval is stretched to keep; null
            never stretches it.

    Raises:
        ValueError: If an argument is out of range, or both intervals are given.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[ByzantineMonitor(alarm_share=0.3)], logger=False)
    """

    metric_keys: ClassVar[tuple[str, ...]] = (
        "byzantine/weight/*",
        "byzantine/distance/*",
        "byzantine/rejected/*",
        "byzantine/num_rejected",
    )

    def __init__(
        self,
        every_n_steps: int | None = None,
        every_n_epochs: int | None = None,
        alarm_share: float | None = 0.5,
        horizon: int = 50,
        max_overhead: float | None = 0.01,
    ) -> None:
        super().__init__(every_n_steps, every_n_epochs, max_overhead, default_every_n_steps=50)
        fits = alarm_share is None or 0 < alarm_share <= 1
        expect(fits, "alarm_share", "in (0, 1]", alarm_share, "null never names a rank.")
        expect(horizon >= 1, "horizon", "at least 1", horizon, "50 is the default.")
        self.alarm_share, self.horizon = alarm_share, horizon
        self.hosts: list[str] = []
        self._unit = "rank"
        self.reset()

    def reset(self) -> None:
        """Clear all counts."""
        self.tally = RejectionTally(self.horizon)
        self.named: list[int] = []
        self._last: list[float] = []
        self._seen: dict[int, int] = {}  # by optimizer, the last step that was counted

    def identity(self) -> dict[str, Any]:
        """Return interval, alarm and horizon."""
        alarm = {"alarm_share": self.alarm_share, "horizon": self.horizon}
        return {**super().identity(), **alarm}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gather the names of the hosts; then look for the first time."""
        self.hosts = gather_texts(trainer, socket.gethostname())
        self._unit = "rank" if trainer.world_size > 1 else "micro_batch"
        super().on_train_start(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Request distances in a step that is followed by a look."""
        strategy = trainer.strategy
        is_due = self.schedule.is_due(self._count(trainer) + 1)
        wanted = is_due and (self.unit == "step" or trainer.is_last_batch)
        # Never withdrawn here: another monitor may have requested them for the same step.
        if wanted and isinstance(strategy, ReportsAggregation):
            strategy.request_distances(True)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        """Count the workers that the rule rejected; look, if it is time to."""
        self._count_rejections(trainer)
        super().on_train_batch_end(trainer, pl_module, *args, **kwargs)
        if isinstance(trainer.strategy, ReportsAggregation):
            trainer.strategy.request_distances(False)

    def _count_rejections(self, trainer: Trainer) -> None:
        for index, report in enumerate(_reports(trainer)):
            if report.step is None or self._seen.get(index) == report.step:
                continue  # a batch without a step
            self._seen[index] = report.step
            flags = rejected(report.num_workers, report.dropped, report.weights, report.distances)
            if flags is not None:
                self._last = by_rank([float(flag) for flag in flags], _num_units(trainer, report))
                self.tally.add(self._last)
        self._raise_alarm(trainer)

    def _raise_alarm(self, trainer: Trainer) -> None:
        suspects = [] if self.alarm_share is None else self.tally.suspects(self.alarm_share)
        for worker in suspects:
            if worker not in self.named:
                self.named.append(worker)
                rank_zero_warn(
                    f"{self._name(worker)} was rejected in {_percent(self.tally.recent[worker])} of the last "
                    f"{self.horizon} steps. Look at its data, its memory and its hardware."
                )

    def look(self, trainer: Trainer, pl_module: LightningModule) -> Mapping[str, float]:
        """Read the report of the strategy on its last step."""
        report = next((r for r in _reports(trainer) if r.step is not None), None)
        units = _num_units(trainer, report)
        weights = _of_units(None if report is None else report.weights, units)
        values: dict[str, float] = {"num_rejected": sum(self._last) if self._last else math.nan}
        per_unit = {
            "weight": [weight * _per_unit(report, units) for weight in weights],
            "distance": _of_units(None if report is None else report.distances, units),
            "rejected": self.tally.recent or [math.nan] * units,
        }
        for name, numbers in per_unit.items():
            for worker, number in enumerate(numbers):
                values[f"{name}/{self._unit}_{worker}"] = number
        return {f"byzantine/{name}": value for name, value in values.items()}

    def describe_start(self, trainer: Trainer, pl_module: LightningModule) -> str:
        """Return what is watched."""
        if not isinstance(trainer.strategy, ReportsAggregation):
            return f"nothing to watch with {type(trainer.strategy).__name__}; use ByzantineStrategy"
        alarm = ""
        if self.alarm_share is not None:
            alarm = (
                f", naming those rejected in {_percent(self.alarm_share)} of {self.horizon} steps"
            )
        return f"weight, distance and rejections of each {self._unit.replace('_', '-')}{alarm}"

    def describe_end(self, trainer: Trainer, pl_module: LightningModule) -> str:
        """Return which workers were rejected, and how often."""
        shares = self.tally.shares()
        worst = sorted(range(len(shares)), key=lambda worker: -shares[worker])
        often = [worker for worker in worst if shares[worker] >= WORTH_NAMING]
        if not shares:
            return "no step showed whether a worker was rejected."
        if not often:
            return f"in {self.tally.num_steps} steps no worker was rejected in more than {_percent(shares[worst[0]])}."
        said = [f"{self._name(w)} was rejected in {_percent(shares[w])} of steps" for w in often]
        return f"{', '.join(said)}, of the {self.tally.num_steps} that show it."

    def _name(self, worker: int) -> str:
        if self._unit != "rank":
            return f"micro-batch {worker}"
        return f"rank {worker} on host {self.hosts[worker]}"

    def state_dict(self) -> dict[str, Any]:
        """Return the counts, and the state of the schedule."""
        return {**super().state_dict(), "tally": asdict(self.tally), "named": list(self.named)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        super().load_state_dict(state_dict)
        self.tally = RejectionTally(**state_dict["tally"])
        self.named = list(state_dict["named"])


def _reports(trainer: Trainer) -> Sequence[StepReport]:
    """Return the reports of the last step, by optimizer; none if the strategy makes none."""
    strategy = trainer.strategy
    return strategy.reports if isinstance(strategy, ReportsAggregation) else ()


def _num_units(trainer: Trainer, report: StepReport | None) -> int:
    """Return the number of ranks, or of micro-batches on one device."""
    if trainer.world_size == 1 and report is not None:
        return report.num_workers
    return trainer.world_size


def _per_unit(report: StepReport | None, num_units: int) -> float:
    return 1.0 if report is None else report.num_workers / num_units


def _of_units(values: Tensor | None, num_units: int) -> list[float]:
    return [math.nan] * num_units if values is None else by_rank(values.tolist(), num_units)


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
