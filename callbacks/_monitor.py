"""What every monitor has in common: when it looks, that it changes nothing, and where its values go."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng

from lightning_sgd._validation import expect
from lightning_sgd.functional.tick_schedule import TickSchedule


class Monitor(Callback):
    """Looks at training now and then, without changing it.

    A subclass says what it sees (:meth:`look`), what it is going to do (:meth:`announce`) and what it found
    (:meth:`conclude`). It looks before the first step, after every ``every_n_steps`` optimizer steps or
    ``every_n_epochs`` epochs, and at the end; all ranks at the same time.

    Args:
        every_n_steps: Interval in optimizer steps; give this or ``every_n_epochs``.
        every_n_epochs: Interval in epochs; by default every epoch.
        max_overhead: Largest share of the training time for looking, which the interval is stretched to keep; ``None``
            never stretches it.

    Raises:
        ValueError: If an argument is out of range, or both intervals are given.
    """

    def __init__(
        self, every_n_steps: int | None, every_n_epochs: int | None, max_overhead: float | None
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
        self.schedule = TickSchedule(1 if every is None else every, max_overhead)
        self._last_count: int | None = None
        self._last_end = 0.0
        self._cost = 0.0
        self._pace_known = False
        self._restored = False

    @abstractmethod
    def look(self, trainer: Trainer, pl_module: LightningModule) -> Mapping[str, float]:
        """Measure, on every rank, and return what all ranks agree on: the keys and values to log."""

    @abstractmethod
    def announce(self, trainer: Trainer, pl_module: LightningModule) -> str:
        """What is measured, as the middle of the line at the start."""

    @abstractmethod
    def conclude(self, trainer: Trainer, pl_module: LightningModule) -> str:
        """What was found, as the line at the end."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Expect a checkpoint after this, for this stage only: a test loads one too."""
        self._restored = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget an earlier fit, unless this one goes on from its checkpoint."""
        if not self._restored:
            self.schedule.next_tick, self.schedule.stretch = 0, 1
            self._last_count = None
        self._pace_known, self._cost = False, 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the module as it is, unless that was done before an interruption, and say what is going to happen."""
        self._last_end = time.perf_counter()
        if self._last_count is None:
            self._tick(trainer, pl_module)
        every, share = self.schedule.every, self.schedule.max_overhead
        interval = f"every {self.unit}" if every == 1 else f"every {every} {self.unit}s"
        cost = f", {1e3 * self._cost:.1f} ms for the first look" if self._cost else ""
        limit = f", at most {share:.1%} of the time" if share is not None else ""
        places = ", ".join(type(logger).__name__ for logger in trainer.loggers) or "no logger"
        rank_zero_info(
            f"{type(self).__name__}: {self.announce(trainer, pl_module)}, {interval}{cost}{limit}; "
            f"values go to {places}."
        )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        """Look, if it is time to, after the last batch of an optimizer step."""
        if self.unit == "step":
            # Lightning counts this batch only after this hook.
            self._tick_if_due(trainer, pl_module, num_uncounted=1)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look, if it is time to."""
        if self.unit == "epoch":
            self._tick_if_due(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look once more, and say what was found."""
        if self._last_count != self._count(trainer):
            self._tick(trainer, pl_module)
        rank_zero_info(f"{type(self).__name__}: {self.conclude(trainer, pl_module)}")

    def state_dict(self) -> dict[str, Any]:
        """What the next look depends on."""
        return {
            "last_count": self._last_count,
            "next_tick": self.schedule.next_tick,
            "stretch": self.schedule.stretch,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on as :meth:`state_dict` says."""
        self._restored = True
        self._last_count = state_dict["last_count"]
        self.schedule.next_tick = state_dict["next_tick"]
        self.schedule.stretch = state_dict["stretch"]

    def _count(self, trainer: Trainer) -> int:
        """Steps or epochs that are done."""
        if self.unit == "step":
            return trainer.global_step
        return int(trainer.fit_loop.epoch_progress.current.processed)  # type: ignore[attr-defined]  # typed as its base

    def _tick_if_due(
        self, trainer: Trainer, pl_module: LightningModule, num_uncounted: int = 0
    ) -> None:
        count = self._count(trainer)
        if self.schedule.is_due(count) and not self._pace_known:
            # The plan was made at the first look, when nobody knew how fast training is.
            self._plan(trainer, self._pace(count))
        if self.schedule.is_due(count):
            self._tick(trainer, pl_module, num_uncounted)

    def _tick(self, trainer: Trainer, pl_module: LightningModule, num_uncounted: int = 0) -> None:
        count = self._count(trainer)
        pace, begin = self._pace(count), time.perf_counter()
        with _random_states_kept(), torch.no_grad():
            values = self.look(trainer, pl_module)
        self._last_count, self._cost = count, time.perf_counter() - begin
        self._plan(trainer, pace)
        self._last_end = time.perf_counter()
        self._log(trainer, values, num_uncounted)

    def _pace(self, count: int) -> float | None:
        """Seconds per step or epoch since the last look."""
        if self._last_count is None or self._last_count == count:
            return None
        return (time.perf_counter() - self._last_end) / (count - self._last_count)

    def _plan(self, trainer: Trainer, pace: float | None) -> None:
        """Plan the next look by the slowest rank's look and the fastest rank's pace, so that all plan the same."""
        cost, negative_pace = agree_on_largest(trainer, [self._cost, -(pace or 0.0)])
        self.schedule.record(self._last_count or 0, cost, -negative_pace or None)
        self._pace_known = pace is not None

    @staticmethod
    def _log(trainer: Trainer, values: Mapping[str, float], num_uncounted: int) -> None:
        """To ``callback_metrics``, and to the loggers at once: Lightning's own interval would drop most looks."""
        step = trainer.fit_loop.epoch_loop._batches_that_stepped + num_uncounted
        for logger in trainer.loggers:
            logger.log_metrics(dict(values), step=step)
        # Not by `pl_module.log`, which would reduce over ranks what all ranks already agree on.
        trainer.callback_metrics.update({key: torch.tensor(value) for key, value in values.items()})


@contextmanager
def _random_states_kept() -> Iterator[None]:
    """Put all random states back; Lightning's `isolate_rng` alone does not when something fails."""
    failure: BaseException | None = None
    with isolate_rng():
        try:
            yield
        except BaseException as error:
            failure = error
    if failure is not None:
        raise failure


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
