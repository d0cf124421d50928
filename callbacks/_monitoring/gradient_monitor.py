"""The base of monitors that compare several gradients at the same weights."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

from lightning.pytorch import LightningModule, Trainer

from lightning_sgd.callbacks._monitoring.figures import publish_if_possible
from lightning_sgd.callbacks._monitoring.gradient_collector import GradientCollector
from lightning_sgd.callbacks._monitoring.history import TimeSeries
from lightning_sgd.callbacks._monitoring.monitor import Monitor

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class GradientMonitor(Monitor):
    """Measure a sample of gradients, which monitors with the same settings share.

    A subclass asks ``self.collector`` for the sample in :meth:`look`, and keeps results in ``self.history``. Gradients
    of extra passes are taken between steps, as every monitor looks. Gradients of training itself are recorded in the
    first step after a look is due; the look is charged and logged as one at the weights with which that step began.
    There is no such step after the last one.

    Args:
        collector: Takes the gradients.
        every_n_steps: As of :class:`Monitor`.
        every_n_epochs: As of :class:`Monitor`.
        max_overhead: As of :class:`Monitor`.
        default_every_n_steps: As of :class:`Monitor`.
        log_layers: Whether to log one value per parameter, too.
        save_figure: Whether to publish a figure at the end.
    """

    figure_stem: ClassVar[str] = ""
    """Name of the files of the figure."""
    figure_key: ClassVar[str] = ""
    """Name of the figure in a logger."""
    headline: ClassVar[str] = ""
    """Quantity without whose finite values there is nothing to draw."""

    history: TimeSeries
    _awaited: tuple[int, int] | None = None
    """Count and optimizer step at which the step began that is being recorded."""

    def __init__(
        self,
        collector: GradientCollector,
        every_n_steps: int | None,
        every_n_epochs: int | None,
        max_overhead: float | None,
        default_every_n_steps: int | None = None,
        log_layers: bool = False,
        save_figure: bool = False,
    ) -> None:
        super().__init__(
            every_n_steps,
            every_n_epochs,
            max_overhead,
            default_every_n_steps=default_every_n_steps,
        )
        self.collector = collector
        self.log_layers, self.save_figure = log_layers, save_figure
        self.reset()

    @abstractmethod
    def describe_findings(self) -> str:
        """Return the end message, where there is at least one measurement."""

    def describe_sample(self, trainer: Trainer, pl_module: LightningModule) -> str:
        """Return the start message, where gradients can be collected."""
        return self.collector.describe(trainer, pl_module)

    def plot(self) -> Figure:
        """Draw what was found."""
        raise NotImplementedError  # not abstract: a monitor need not have a figure

    @property
    def times(self) -> list[int]:
        """Optimizer steps of the measurements."""
        return self.history.times

    @property
    def values(self) -> dict[str, list[float]]:
        """By quantity, one number for each of ``times``."""
        return self.history.values

    def reset(self) -> None:
        """Clear the history."""
        self.history = TimeSeries()

    def identity(self) -> dict[str, Any]:
        """Return the settings of the sample and the interval."""
        loss_fn = getattr(self.collector.loss_fn, "__name__", None)
        return {**self.collector.settings, "loss_fn": loss_fn, **super().identity()}

    def describe_start(self, trainer: Trainer, pl_module: LightningModule) -> str:
        """Return how many gradients are collected, or the reason why none are."""
        obstacle = self.collector.obstacle(trainer, pl_module)
        if obstacle is None and self.collector.trouble is not None:
            step, reason = self.collector.trouble
            sample = self.describe_sample(trainer, pl_module)
            return f"{sample}, of which nothing could be measured at step {step}, because {reason}"
        if obstacle is not None:
            return f"nothing can be measured, because {obstacle}"
        return self.describe_sample(trainer, pl_module)

    def describe_end(self, trainer: Trainer, pl_module: LightningModule) -> str:
        """Return what was found, and publish the figure."""
        lost = ""
        if self.collector.trouble is not None:
            step, reason = self.collector.trouble
            lost = f" At step {step} nothing could be measured, because {reason}."
        if not self.history.times:
            return f"no gradient noise was measured.{lost}"
        return f"{self.describe_findings()}{lost}{self._publish_figure(trainer)}"

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Share the gradients with other monitors."""
        super().on_fit_start(trainer, pl_module)
        if self.collector.steps is not None:
            self.collector.steps.refuse_single_gradients(trainer)
        self.collector = self.collector.shared(trainer)
        self.collector.reset()
        self._awaited = None

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """If it is time to look, record the gradients of the step that begins."""
        if self.collector.steps is None:
            return
        count = self._count(trainer)
        is_due = self._awaited is None and self.schedule.is_due(count)
        if is_due and self.collector.begin_step(trainer, pl_module, batch_idx):
            self._awaited = count, trainer.global_step
        if self._awaited is not None:
            self.collector.steps.begin_batch(trainer, batch, batch_idx)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Start recording the gradients of this backward pass."""
        if self.collector.steps is not None:
            self.collector.steps.set_recording(True)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop recording."""
        if self.collector.steps is not None:
            self.collector.steps.set_recording(False)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        """Look, if it is time to or if the gradients are there, after the last batch of an optimizer step."""
        super().on_train_batch_end(trainer, pl_module, *args, **kwargs)
        if self._awaited is None or self._awaited[1] == trainer.global_step:
            return
        (count, _), self._awaited = self._awaited, None
        seconds = self.collector.finish_step(trainer)
        if self.collector.sample(trainer, pl_module) is not None:
            # Lightning has not counted this step yet, which is right: the gradients are from before it.
            super()._look_if_affordable(trainer, pl_module, count=count, spent=seconds)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Remove hooks from the parameters."""
        if self.collector.steps is not None:
            self.collector.steps.abandon()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Free the gradients."""
        self.collector.reset()

    def _look_if_affordable(  # type: ignore[override]  # passes them on
        self, trainer: Trainer, pl_module: LightningModule, **settings: Any
    ) -> None:
        if self.collector.steps is None:
            super()._look_if_affordable(trainer, pl_module, **settings)

    def _publish_figure(self, trainer: Trainer) -> str:
        series = self.history.values.get(self.headline, ()) if self.save_figure else ()
        if not any(map(math.isfinite, series)):
            return ""
        return publish_if_possible(trainer, self.plot, self.figure_stem, self.figure_key)
