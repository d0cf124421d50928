"""Watches which workers a robust rule rejects."""

from __future__ import annotations

import math
import socket
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, ClassVar

import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_sgd._validation import expect
from lightning_sgd.callbacks._monitoring.monitor import Monitor
from lightning_sgd.functional.robust.rejections import RejectionTally, by_rank, rejected

WORTH_SAYING = 0.1
"""Share of steps from which on a rejected worker is named at the end."""


class ByzantineMonitor(Monitor):
    """Logs what ``ByzantineStrategy`` makes of each rank, and names the rank that it keeps rejecting.

    For each rank, or micro-batch where these are the workers,

    - ``byzantine/weight/rank_3``, its share in the last gradient, for rules that have weights,
    - ``byzantine/distance/rank_3`` of what it sent from the gradient that was used,
    - ``byzantine/rejected/rank_3``, the share of the last ``horizon`` steps in which it was rejected,

    and ``byzantine/num_rejected``, how many were in the last step. Rejected is whose gradient was dropped as not finite
    or far too long, or got less than a tenth of the median weight; or, for rules without weights and such as Krum that
    give most workers none, whose distance is more than three times the median. For these, only the steps before a look
    count, because distances are taken there alone.

    A rank that lately is rejected in ``alarm_share`` of the steps, and at least twice as often as the median rank, is
    named once, with its host. With another strategy there is nothing to see, and NaN is logged.

    Cost: distances take one pass over the gradients before each look, and an exchange of n numbers; the rest is known.
    Training is not changed, to the last bit.

    Args:
        every_n_steps: Look after so many optimizer steps; by default after every 50.
        every_n_epochs: Look after so many epochs; instead of ``every_n_steps``.
        alarm_share: Share of steps from which on a rank is named; null never does.
        horizon: How many steps back "lately" goes.
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
        steps = 50 if every_n_steps is None and every_n_epochs is None else every_n_steps
        super().__init__(steps, every_n_epochs, max_overhead)
        fits = alarm_share is None or 0 < alarm_share <= 1
        expect(fits, "alarm_share", "in (0, 1]", alarm_share, "null never names a rank.")
        expect(horizon >= 1, "horizon", "at least 1", horizon, "50 is the default.")
        self.alarm_share, self.horizon = alarm_share, horizon
        self._interval = (steps, every_n_epochs)
        self.hosts: list[str] = []
        self._unit = "rank"
        self._forget()

    def _forget(self) -> None:
        self.tally = RejectionTally(self.horizon)
        self.named: list[int] = []
        self._last: list[float] = []
        self._seen: dict[int, int] = {}

    @property
    def state_key(self) -> str:
        """Tells instances with different settings apart in a checkpoint."""
        return self._generate_state_key(
            interval=list(self._interval), alarm_share=self.alarm_share, horizon=self.horizon
        )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget an earlier training, unless this one goes on from its checkpoint."""
        restored = self._restored
        super().on_fit_start(trainer, pl_module)
        if not restored:
            self._forget()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Learn the names of the hosts; then look for the first time."""
        self.hosts = _hosts(trainer)
        self._unit = "rank" if trainer.world_size > 1 else "micro_batch"
        super().on_train_start(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Ask for distances in a step that is looked at."""
        if _reports(trainer) is None:
            return
        is_due = self.schedule.is_due(self._count(trainer) + 1)
        strategy: Any = trainer.strategy
        strategy.measures_distances |= is_due and (self.unit == "step" or trainer.is_last_batch)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        """Count whom the rule rejected; look, if it is time to."""
        self._count_rejections(trainer)
        super().on_train_batch_end(trainer, pl_module, *args, **kwargs)
        if _reports(trainer) is not None:
            strategy: Any = trainer.strategy
            strategy.measures_distances = False

    def _count_rejections(self, trainer: Trainer) -> None:
        for index, report in enumerate(_reports(trainer) or []):
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
        """Take what the strategy knows of its last step."""
        report = next((r for r in _reports(trainer) or [] if r.step is not None), None)
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

    def announce(self, trainer: Trainer, pl_module: LightningModule) -> str:
        """Whom it watches."""
        if _reports(trainer) is None:
            return f"nothing to see with {type(trainer.strategy).__name__}; use ByzantineStrategy"
        alarm = ""
        if self.alarm_share is not None:
            alarm = (
                f", naming those rejected in {_percent(self.alarm_share)} of {self.horizon} steps"
            )
        return f"weight, distance and rejections of each {self._unit.replace('_', '-')}{alarm}"

    def conclude(self, trainer: Trainer, pl_module: LightningModule) -> str:
        """Who was rejected, and how often."""
        shares = self.tally.shares()
        worst = sorted(range(len(shares)), key=lambda worker: -shares[worker])
        often = [worker for worker in worst if shares[worker] >= WORTH_SAYING]
        if not shares:
            return "in no step could it be known whether a worker was rejected."
        if not often:
            return f"in {self.tally.num_steps} steps nobody was rejected in more than {_percent(shares[worst[0]])}."
        said = [f"{self._name(w)} was rejected in {_percent(shares[w])} of steps" for w in often]
        return f"{', '.join(said)}, of {self.tally.num_steps} in which it could be known."

    def _name(self, worker: int) -> str:
        if self._unit != "rank":
            return f"micro-batch {worker}"
        return f"rank {worker} on host {self.hosts[worker]}"

    def state_dict(self) -> dict[str, Any]:
        """Who was rejected so far, and when to look next."""
        return {**super().state_dict(), "tally": asdict(self.tally), "named": list(self.named)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        super().load_state_dict(state_dict)
        self.tally = RejectionTally(**state_dict["tally"])
        self.named = list(state_dict["named"])


def _reports(trainer: Trainer) -> list[Any] | None:
    """What a strategy says of its last step, by optimizer; ``None`` if it says nothing."""
    reports: list[Any] | None = getattr(trainer.strategy, "reports", None)
    return reports


def _num_units(trainer: Trainer, report: Any) -> int:
    """Ranks; or micro-batches on one device."""
    if trainer.world_size == 1 and report is not None:
        return int(report.num_workers)
    return trainer.world_size


def _per_unit(report: Any, num_units: int) -> float:
    return 1.0 if report is None else report.num_workers / num_units


def _of_units(values: Tensor | None, num_units: int) -> list[float]:
    return [math.nan] * num_units if values is None else by_rank(values.tolist(), num_units)


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _hosts(trainer: Trainer) -> list[str]:
    """Of every rank."""
    names: list[Any] = [socket.gethostname()] * trainer.world_size
    if trainer.world_size > 1:
        dist.all_gather_object(names, socket.gethostname())
    return names
