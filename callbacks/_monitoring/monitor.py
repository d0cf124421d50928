"""The base of all monitors: schedule, logging, start and end messages, state in checkpoints."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_sgd._distributed import reduce_max
from lightning_sgd._run_log import announce, log_metrics, logger_names
from lightning_sgd._validation import expect
from lightning_sgd.callbacks._monitoring.look_schedule import LookKind, LookSchedule
from lightning_sgd.callbacks._monitoring.module_state import random_states_kept


class Monitor(Callback):
    """Measure training at intervals, without changing it.

    A subclass measures in :meth:`look`, describes itself in :meth:`describe_start` and :meth:`describe_end`, and clears
    what it measured in :meth:`reset`. One with expensive looks may have a :meth:`cheap_look` too. There is a look
    before the first step, after every ``every_n_steps`` optimizer steps or ``every_n_epochs`` epochs, and at the end,
    as far as ``max_overhead`` allows. All ranks look at the same time.

    Args:
        every_n_steps: Interval in optimizer steps; give this or ``every_n_epochs``.
        every_n_epochs: Interval in epochs.
        max_overhead: Largest share of the training time for looks, the first one included; ``None`` sets no limit.
        full_every: Intervals between full looks, where there is a cheap look.
        default_every_n_steps: Interval if none is given; ``None`` looks after every epoch.

    Raises:
        ValueError: If an argument is out of range, or both intervals are given.
    """

    metric_keys: ClassVar[tuple[str, ...]] = ()
    """Keys of the values that it logs; ``*`` stands for a name that depends on the training, such as a layer's."""

    def __init__(
        self,
        every_n_steps: int | None,
        every_n_epochs: int | None,
        max_overhead: float | None,
        full_every: int = 1,
        default_every_n_steps: int | None = None,
    ) -> None:
        expect(
            every_n_steps is None or every_n_epochs is None,
            "every_n_epochs",
            "left out beside `every_n_steps`",
            every_n_epochs,
            "Choose one interval.",
        )
        if every_n_steps is None and every_n_epochs is None:
            every_n_steps = default_every_n_steps
        self._interval = [every_n_steps, every_n_epochs]
        self.unit = "epoch" if every_n_steps is None else "step"
        every = every_n_epochs if every_n_steps is None else every_n_steps
        self.schedule = LookSchedule(1 if every is None else every, max_overhead, full_every)
        self._last_count: int | None = None
        self._last_kind: LookKind | None = None
        self._last_keys: set[str] = set()
        self._seconds_before = 0.0  # training time until the clock started, less all looks since
        self._clock_start: float | None = None
        self._restored = False

    # For subclasses.

    @abstractmethod
    def look(self, trainer: Trainer, pl_module: LightningModule) -> Mapping[str, float]:
        """Measure, on every rank, and return the values to log by key, equal on all ranks."""

    def cheap_look(self, trainer: Trainer, pl_module: LightningModule) -> Mapping[str, float]:
        """Measure only what takes a fraction of the time; called where ``self.schedule.has_cheap_look``."""
        raise NotImplementedError  # not abstract: most monitors have none

    @abstractmethod
    def describe_start(self, trainer: Trainer, pl_module: LightningModule) -> str:
        """Return what is going to be measured, as the beginning of the start message."""

    @abstractmethod
    def describe_end(self, trainer: Trainer, pl_module: LightningModule) -> str:
        """Return what was found, as the end message; the last look may have been some time ago."""

    def reset(self) -> None:
        """Clear what was measured; called before every fit that does not resume this monitor from a checkpoint."""

    def identity(self) -> dict[str, Any]:
        """Return the settings that tell two instances apart in a checkpoint, whose keys depend on their order too."""
        return {"interval": self._interval}

    # Hooks of Lightning.

    @property
    def state_key(self) -> str:
        """The name of this instance in a checkpoint."""
        return self._generate_state_key(**self.identity())

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Expect a checkpoint after this hook, for this stage only: ``trainer.test`` restores callbacks, too."""
        self._restored, self._clock_start = False, None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Clear an earlier fit, unless this one resumes from a checkpoint."""
        if not self._restored:
            self.schedule.reset()
            self._last_count, self._last_kind, self._seconds_before = None, None, 0.0
            self.reset()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look for the first time, unless that was done before an interruption, and announce."""
        self._clock_start = time.perf_counter()
        if self._last_count is None:
            self._look_if_affordable(trainer, pl_module)
        what = f"{self.describe_start(trainer, pl_module)}, {self._describe_cost()}"
        sentence = f"{what}; values go to {logger_names(trainer)}."
        announce(trainer, type(self).__name__, "start", sentence)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        """Look, if it is time to, after the last batch of an optimizer step."""
        if self.unit == "step" and self.schedule.is_due(self._count(trainer)):
            # Lightning counts this batch only after this hook.
            self._look_if_affordable(trainer, pl_module, num_uncounted=1)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look, if it is time to."""
        if self.unit == "epoch" and self.schedule.is_due(self._count(trainer)):
            self._look_if_affordable(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look once more, if that can be afforded, and announce what was found."""
        if self._last_count != self._count(trainer) or self._last_kind == "glance":
            self._look_if_affordable(trainer, pl_module, last=True)
        self._seconds_before, self._clock_start = self._seconds(), None
        announce(trainer, type(self).__name__, "end", self.describe_end(trainer, pl_module))

    def state_dict(self) -> dict[str, Any]:
        """Return what the next look depends on."""
        return {
            "last_count": self._last_count,
            "last_rung": self._last_kind,
            "seconds": self._seconds(),
            "schedule": self.schedule.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self._restored = True
        self._last_count = state_dict["last_count"]
        self._last_kind = state_dict["last_rung"]
        self._seconds_before = state_dict["seconds"]
        self.schedule.load_state_dict(state_dict["schedule"])

    # Mechanism.

    def _count(self, trainer: Trainer) -> int:
        """Return the number of optimizer steps or epochs that are done."""
        if self.unit == "step":
            return trainer.global_step
        return int(trainer.fit_loop.epoch_progress.current.processed)  # type: ignore[attr-defined]  # typed as its base

    def _seconds(self) -> float:
        """Return the training time so far, without looks, by the clock of this rank."""
        if self._clock_start is None:
            return self._seconds_before
        return self._seconds_before + time.perf_counter() - self._clock_start

    def _look_if_affordable(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        num_uncounted: int = 0,
        last: bool = False,
        count: int | None = None,
        spent: float = 0.0,
    ) -> None:
        """Choose the kind of look, make it, log its values and charge its time.

        Args:
            trainer: The trainer.
            pl_module: The module.
            num_uncounted: Batches with a step that Lightning has not counted yet.
            last: Whether training has ended.
            count: Steps or epochs at which the look is charged; by default those that are done.
            spent: Seconds that preparing this look took before.
        """
        count = self._count(trainer) if count is None else count
        kind = self.schedule.choose(count, self._agreed_seconds(trainer), last=last)
        if kind is None or (kind == "glance" and count == self._last_count):
            return  # a second cheap look at the same weights would find nothing new
        begin = time.perf_counter() - spent
        with random_states_kept(), torch.no_grad():
            values = (self.look if kind == "look" else self.cheap_look)(trainer, pl_module)
        if count == self._last_count:
            values = {key: values[key] for key in values.keys() - self._last_keys}
        log_metrics(trainer, values, num_uncounted)
        taken = time.perf_counter() - begin
        self._seconds_before -= taken
        # By the slowest rank: the schedules of all ranks must stay equal, or one would look without the others.
        (cost,) = reduce_max(trainer, [taken])
        self.schedule.record(kind, count, cost)
        self._last_count, self._last_kind, self._last_keys = count, kind, set(values)

    def _agreed_seconds(self, trainer: Trainer) -> float:
        """Return the training time of the fastest rank, so that all ranks decide alike; 0 where it does not matter."""
        if not self.schedule.needs_time:
            return 0.0
        (negative,) = reduce_max(trainer, [-self._seconds()])
        return -negative

    def _describe_cost(self) -> str:
        schedule = self.schedule
        every, share = schedule.every, schedule.max_overhead
        parts = [f"every {self.unit}" if every == 1 else f"every {every} {self.unit}s"]
        if schedule.look_cost:
            parts.append(f"{1e3 * schedule.look_cost:.1f} ms for a full look")
        if share is not None:
            wait = schedule.enough_after - self._seconds()
            after = f", which pays for the next look after {wait:.0f} s" if wait >= 1 else ""
            parts.append(f"at most {share:.1%} of the time{after}")
        return ", ".join(parts)
