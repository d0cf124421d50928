"""What every monitor has in common: when it looks, that it changes nothing, and where its values go."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_sgd._run_log import announce
from lightning_sgd._validation import expect
from lightning_sgd.callbacks._monitoring.look_schedule import LookKind, LookSchedule
from lightning_sgd.callbacks._monitoring.module_state import random_states_kept


class Monitor(Callback):
    """Looks at training now and then, without changing it.

    A subclass says what it sees (:meth:`look`), what it is going to do (:meth:`announce`) and what it found
    (:meth:`conclude`). One whose looks can be expensive may also say what it sees at a :meth:`glance`. It looks before
    the first step, after every ``every_n_steps`` optimizer steps or ``every_n_epochs`` epochs, and at the end, as far
    as ``max_overhead`` allows; all ranks at the same time.

    Args:
        every_n_steps: Interval in optimizer steps; give this or ``every_n_epochs``.
        every_n_epochs: Interval in epochs; by default every epoch.
        max_overhead: Largest share of the training time for looking, the first look included; ``None`` sets no limit.
        full_every: Intervals between full looks, for monitors that can glance.

    Raises:
        ValueError: If an argument is out of range, or both intervals are given.
    """

    def __init__(
        self,
        every_n_steps: int | None,
        every_n_epochs: int | None,
        max_overhead: float | None,
        full_every: int = 1,
    ) -> None:
        expect(
            every_n_steps is None or every_n_epochs is None,
            "every_n_epochs",
            "left out beside `every_n_steps`",
            every_n_epochs,
            "Choose one interval.",
        )
        self.unit = "epoch" if every_n_steps is None else "step"
        every = every_n_epochs if every_n_steps is None else every_n_steps
        self.schedule = LookSchedule(1 if every is None else every, max_overhead, full_every)
        self._last_count: int | None = None
        self._last_rung: LookKind | None = None
        self._last_keys: set[str] = set()
        self._seconds_before = 0.0  # of training until the clock was started, less all looks since
        self._clock_start: float | None = None
        self._restored = False

    @abstractmethod
    def look(self, trainer: Trainer, pl_module: LightningModule) -> Mapping[str, float]:
        """Measure, on every rank, and return what all ranks agree on: the keys and values to log."""

    def glance(self, trainer: Trainer, pl_module: LightningModule) -> Mapping[str, float]:
        """The same with fewer keys, for a fraction of the time, where ``self.schedule.can_glance``."""
        raise NotImplementedError  # not abstract: only monitors whose schedule glances have one

    @abstractmethod
    def announce(self, trainer: Trainer, pl_module: LightningModule) -> str:
        """What is measured, as the middle of the line at the start."""

    @abstractmethod
    def conclude(self, trainer: Trainer, pl_module: LightningModule) -> str:
        """What was found, as the line at the end; the last look may have been some time ago."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Expect a checkpoint after this, for this stage only: a test loads one too."""
        self._restored, self._clock_start = False, None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget an earlier fit, unless this one goes on from its checkpoint."""
        if not self._restored:
            self.schedule.reset()
            self._last_count, self._last_rung, self._seconds_before = None, None, 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the module as it is, unless that was done before an interruption, and say what is going to happen."""
        self._clock_start = time.perf_counter()
        if self._last_count is None:
            self._tick(trainer, pl_module)
        places = ", ".join(type(logger).__name__ for logger in trainer.loggers) or "no logger"
        what = f"{self.announce(trainer, pl_module)}, {self._describe_cost()}"
        announce(trainer, type(self).__name__, "start", f"{what}; values go to {places}.")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        """Look, if it is time to, after the last batch of an optimizer step."""
        if self.unit == "step" and self.schedule.is_due(self._count(trainer)):
            # Lightning counts this batch only after this hook.
            self._tick(trainer, pl_module, num_uncounted=1)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look, if it is time to."""
        if self.unit == "epoch" and self.schedule.is_due(self._count(trainer)):
            self._tick(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look once more, if that can be afforded, and say what was found."""
        if self._last_count != self._count(trainer) or self._last_rung == "glance":
            self._tick(trainer, pl_module, last=True)
        self._seconds_before, self._clock_start = self._seconds(), None
        announce(trainer, type(self).__name__, "end", self.conclude(trainer, pl_module))

    def state_dict(self) -> dict[str, Any]:
        """What the next look depends on."""
        return {
            "last_count": self._last_count,
            "last_rung": self._last_rung,
            "seconds": self._seconds(),
            "schedule": self.schedule.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on as :meth:`state_dict` says."""
        self._restored = True
        self._last_count = state_dict["last_count"]
        self._last_rung = state_dict["last_rung"]
        self._seconds_before = state_dict["seconds"]
        self.schedule.load_state_dict(state_dict["schedule"])

    def _count(self, trainer: Trainer) -> int:
        """Steps or epochs that are done."""
        if self.unit == "step":
            return trainer.global_step
        return int(trainer.fit_loop.epoch_progress.current.processed)  # type: ignore[attr-defined]  # typed as its base

    def _seconds(self) -> float:
        """Training time so far, without looking, by the clock of this rank."""
        if self._clock_start is None:
            return self._seconds_before
        return self._seconds_before + time.perf_counter() - self._clock_start

    def _tick(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        num_uncounted: int = 0,
        last: bool = False,
        count: int | None = None,
        spent: float = 0.0,
    ) -> None:
        """Decide how closely to look, and do it; what led to this look may have taken some time already."""
        count = self._count(trainer) if count is None else count
        rung = self.schedule.choose(count, self._agreed_seconds(trainer), last=last)
        if rung is None or (rung == "glance" and count == self._last_count):
            return  # a second glance at the same moment would see nothing new
        begin = time.perf_counter() - spent
        with random_states_kept(), torch.no_grad():
            values = (self.look if rung == "look" else self.glance)(trainer, pl_module)
        if count == self._last_count:
            values = {key: values[key] for key in values.keys() - self._last_keys}
        self._log(trainer, values, num_uncounted)
        taken = time.perf_counter() - begin
        self._seconds_before -= taken
        (cost,) = agree_on_largest(trainer, [taken])
        self.schedule.record(rung, count, cost)
        self._last_count, self._last_rung, self._last_keys = count, rung, set(values)

    def _agreed_seconds(self, trainer: Trainer) -> float:
        """By the fastest rank, so that all decide the same; 0 where nothing depends on it."""
        if not self.schedule.needs_time:
            return 0.0
        (negative,) = agree_on_largest(trainer, [-self._seconds()])
        return -negative

    def _describe_cost(self) -> str:
        every, share, cost = (
            self.schedule.every,
            self.schedule.max_overhead,
            self.schedule.look_cost,
        )
        parts = [f"every {self.unit}" if every == 1 else f"every {every} {self.unit}s"]
        if cost:
            parts.append(f"{1e3 * cost:.1f} ms for a full look")
        if share is not None:
            wait = self.schedule.enough_after - self._seconds()
            after = f", which pays for the next look after {wait:.0f} s" if wait >= 1 else ""
            parts.append(f"at most {share:.1%} of the time{after}")
        return ", ".join(parts)

    @staticmethod
    def _log(trainer: Trainer, values: Mapping[str, float], num_uncounted: int) -> None:
        """To ``callback_metrics``, and to the loggers at once: Lightning's own interval would drop most looks."""
        step = trainer.fit_loop.epoch_loop._batches_that_stepped + num_uncounted
        for logger in trainer.loggers:
            logger.log_metrics(dict(values), step=step)
        # Not by `pl_module.log`, which would reduce over ranks what all ranks already agree on.
        trainer.callback_metrics.update({key: torch.tensor(value) for key, value in values.items()})


def agree_on_largest(trainer: Trainer, values: list[float]) -> list[float]:
    """The largest of each value over all ranks; a collective if there are several.

    Args:
        trainer: Knows the ranks.
        values: As many on every rank.
    """
    if trainer.world_size == 1:
        return values
    tensor = torch.tensor(values, device=trainer.strategy.root_device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor.tolist()
