"""What monitors have in common that look at several gradients at one point."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningModule, Trainer

from lightning_sgd.callbacks._monitoring.gradient_collector import GradientCollector
from lightning_sgd.callbacks._monitoring.monitor import Monitor
from lightning_sgd.callbacks.rank_monitor.heat_map import publish_if_possible

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class GradientMonitor(Monitor):
    """Looks at a sample of gradients, which it shares with other monitors that want the same.

    A subclass makes ``self.collector`` in its constructor and asks it for the sample in :meth:`look`. Where the
    gradients come from passes of their own, it looks between steps like every monitor. Where they are those of
    training, a look that is due takes place when the next step that can be caught has ended, and is charged and logged
    as one at the weights with which that step began. There is no next step after the last one.
    """

    collector: GradientCollector
    _awaited: tuple[int, int] | None = None
    """Count and step at which the step began that is being caught."""

    def plot(self) -> Figure:
        """Draw what was found."""
        raise NotImplementedError  # not abstract: a monitor need not have a figure

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Share the gradients with other monitors."""
        super().on_fit_start(trainer, pl_module)
        if self.collector.steps is not None:
            self.collector.steps.refuse_single_gradients(trainer)
        self.collector = self.collector.shared(trainer)
        self.collector.forget()
        self._awaited = None

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """If it is time to look, catch the gradients of the step that begins."""
        if self.collector.steps is None:
            return
        count = self._count(trainer)
        is_due = self._awaited is None and self.schedule.is_due(count)
        if is_due and self.collector.begin_step(trainer, pl_module, batch_idx):
            self._awaited = count, trainer.global_step
        if self._awaited is not None:
            self.collector.steps.begin_batch(trainer, batch, batch_idx)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Listen."""
        if self.collector.steps is not None:
            self.collector.steps.listen(True)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen no more."""
        if self.collector.steps is not None:
            self.collector.steps.listen(False)

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
            super()._tick(trainer, pl_module, count=count, spent=seconds)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Leave no hooks behind."""
        if self.collector.steps is not None:
            self.collector.steps.abandon()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Free the gradients."""
        self.collector.forget()

    def _tick(self, trainer: Trainer, pl_module: LightningModule, **settings: Any) -> None:  # type: ignore[override]  # passes them on
        if self.collector.steps is None:
            super()._tick(trainer, pl_module, **settings)

    def _settings_of_collector(self) -> dict[str, Any]:
        """What tells instances apart in a checkpoint."""
        loss_fn = getattr(self.collector.loss_fn, "__name__", None)
        return {**self.collector.settings, "loss_fn": loss_fn}

    def _save_figure(self, trainer: Trainer, series: Iterable[float], stem: str, key: str) -> str:
        """Draw and publish the figure, if there is anything in it; what to say about it."""
        if not any(map(math.isfinite, series)):
            return ""
        return publish_if_possible(trainer, self.plot, stem, key)
