"""Collect several gradients at the same weights, once for all monitors with the same settings."""

from __future__ import annotations

import math
from contextlib import closing
from typing import Any, Literal, TypeAlias

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch.nn.parameter import is_lazy
from torch.utils.data import DataLoader

from lightning_sgd._validation import expect, expect_one_of, warn_no_effect
from lightning_sgd.callbacks._monitoring.extra_batches import (
    LossFunction,
    draws_from_all_rows,
    extra_batches,
    gradient_of,
    num_samples,
    obstacle_to_extra_batches,
    side_effect_free,
    size_of_batches,
)
from lightning_sgd.callbacks._monitoring.step_gradients import StepGradients, gather_interleaved
from lightning_sgd.functional.noise.gradient_sample import (
    Columns,
    Coordinates,
    GradientSample,
    num_reals,
    wide_dtype,
)
from lightning_sgd.functional.noise.gradient_sketch import CountSketch

__all__ = ["GradientCollector", "GradientSource", "LossFunction", "holds_whole_model"]

GradientSource: TypeAlias = Literal["extra", "microbatches", "ranks"]


class GradientCollector:
    """Collect gradients of several batches at the current weights, the same sample on all ranks.

    With the source ``extra``, extra batches are drawn with replacement, by a generator that is seeded from ``seed`` and
    the optimizer step, so that a checkpoint needs no state of it. Ranks share the work. Gradients come from
    ``torch.autograd.grad``, which leaves ``.grad``, the hooks of DDP and a GradScaler alone. Buffers, attributes and
    metrics of the module are restored, also after an exception; the monitor restores random states.

    The two other sources take no extra pass. ``microbatches`` are the gradients of the batches that one optimizer step
    accumulates, on all ranks; ``ranks`` are the gradients of one step that each rank has before they are reduced. Both
    are recorded in the backward passes of that step, between :meth:`begin_step` and :meth:`finish_step`. If ranks have
    weights of their own, as in Local SGD, only steps that begin with the same weights on all ranks are recorded.

    Memory: the sample, this rank's share of it, and with ``extra`` one gradient.

    Attributes:
        settings: Two collectors with the same settings give the same sample.
        steps: Records the gradients of training; ``None`` with ``extra``.
        trouble: Optimizer step of the last sample and why it holds no two gradients; ``None`` if it does.

    Args:
        num_gradients: Gradients over all ranks [m], with ``extra``; rounded up to the same number on each rank.
        num_coordinates: About how many numbers to keep of each gradient [s]; ``None`` for all.
        batch_size: Samples per gradient with ``extra``; by default that of the training data loader.
        train_mode: Whether dropout and batch normalisation behave as in training, or as in evaluation.
        loss_fn: Function of module and batch that returns the loss; by default what ``training_step`` returns.
        seed: Decides on coordinates and batches.
        source: Where gradients come from.
        sketch: Keep a sketch, which preserves the norms of whole gradients, instead of some coordinates.
    """

    def __init__(
        self,
        num_gradients: int,
        num_coordinates: int | None,
        batch_size: int | None = None,
        train_mode: bool = True,
        loss_fn: LossFunction | None = None,
        seed: int = 0,
        source: GradientSource = "extra",
        sketch: bool = False,
    ) -> None:
        remedy = "Noise is measured by differences between gradients."
        expect(num_gradients >= 2, "num_gradients", "at least 2", num_gradients, remedy)
        for name, value in (("num_coordinates", num_coordinates), ("batch_size", batch_size)):
            remedy = "None takes all coordinates, or the batch size of training."
            expect(value is None or value >= 1, name, "at least 1", value, remedy)
        remedy = "The default is 'extra', extra passes."
        expect_one_of(source, GradientSource, "source", remedy)
        self.num_gradients, self.num_coordinates = num_gradients, num_coordinates
        self.batch_size, self.train_mode, self.loss_fn = batch_size, train_mode, loss_fn
        self.seed, self.source, self.sketch = seed, source, sketch
        self.settings: dict[str, Any] = dict(vars(self))
        given = {"batch_size": batch_size, "loss_fn": loss_fn, "train_mode": train_mode or False}
        idle = [name for name, value in given.items() if value not in (None, True)]
        if not self.takes_passes and idle:
            warn_no_effect(
                f"`{idle[0]}` has no effect with source='{source}': the gradients are those of training."
            )
        self.steps = None if source == "extra" else StepGradients(source)
        self.trouble: tuple[int, str] | None = None
        self._last: GradientSample | None = None
        self._columns: tuple[dict[str, int], Columns] | None = None

    @property
    def takes_passes(self) -> bool:
        """Whether gradients come from extra passes between steps, rather than from the steps themselves."""
        return self.source == "extra"

    def shared(self, trainer: Trainer) -> GradientCollector:
        """Return the first collector with the same settings among the callbacks of a Trainer."""
        others = (getattr(callback, "collector", None) for callback in trainer.callbacks)  # type: ignore[attr-defined]  # set by a connector
        mine = self.settings
        same = (c for c in others if isinstance(c, GradientCollector) and c.settings == mine)
        return next(same, self)

    def obstacle(self, trainer: Trainer, pl_module: LightningModule) -> str | None:
        """Return the reason why nothing can be collected in this training; ``None`` if there is none."""
        if not holds_whole_model(trainer):
            return f"{type(trainer.strategy).__name__} leaves no rank a whole gradient"
        if any(map(is_lazy, pl_module.parameters())):
            return "lazy modules have no weights before the first batch; looks begin after it"
        if self.steps is not None:
            return self.steps.obstacle(trainer, pl_module)
        return obstacle_to_extra_batches(trainer, pl_module, self.loss_fn, self.batch_size)

    def describe(self, trainer: Trainer, pl_module: LightningModule) -> str:
        """Return what is collected and how much memory it takes, for the start message."""
        num, ranks = self.coordinates(pl_module).num_coordinates, trainer.world_size
        k, wide = trainer.accumulate_grad_batches, wide_dtype(pl_module.parameters()).itemsize
        if self.steps is None:
            rows, recorded = self.num_gradients, 0
            what = f"{rows} gradients of extra batches"
        else:
            rows, recorded = self.steps.num_gradients(trainer), k
            of_ranks = f" on each of {ranks} ranks" if ranks > 1 else ""
            what = f"gradients of the {k} micro-batches of a step{of_ranks}"
            if self.source == "ranks":
                what = f"the gradients of a step on {ranks} ranks"
        unit = "numbers of a sketch" if self.sketch else "coordinates"
        return f"{what}, {num} {unit}, {1e-6 * wide * (rows + recorded) * num:.3g} MB"

    def reset(self) -> None:
        """Free the last sample, and remove hooks."""
        self._last, self._columns, self.trouble = None, None, None
        if self.steps is not None:
            self.steps.abandon()

    def sample(self, trainer: Trainer, pl_module: LightningModule) -> GradientSample | None:
        """Return gradients at one point, the same on all ranks; ``None`` where there is an obstacle.

        With ``extra`` these are gradients at the current weights; a second monitor that asks at the same step gets the
        same sample. Otherwise they are those of the step that just ended, if it was recorded.
        """
        if not self.takes_passes:
            is_new = self._last is not None and self._last.step + 1 == trainer.global_step
            return self._last if is_new else None
        if self.obstacle(trainer, pl_module) is not None:
            return None
        if self._last is None or self._last.step != trainer.global_step:
            self._last = self._collect(trainer, pl_module)
        return self._last if len(self._last.rows) > 1 else None

    def coordinates(self, pl_module: LightningModule) -> Columns:
        """Return what is kept of a gradient of the trained parameters."""
        sizes = {
            name.replace("_orig_mod.", ""): num_reals(param)
            for name, param in pl_module.named_parameters()
            if param.requires_grad
        }
        if self._columns is None or self._columns[0] != sizes:
            kind = CountSketch if self.sketch else Coordinates
            self._columns = sizes, kind(sizes, self.num_coordinates, self.seed)
        return self._columns[1]

    def begin_step(self, trainer: Trainer, pl_module: LightningModule, batch_idx: int) -> bool:
        """Record the optimizer step that begins now, and return true, if one begins and can be recorded."""
        if self.steps is None or not self.steps.can_begin(trainer, batch_idx):
            return False
        if self.obstacle(trainer, pl_module) is not None:
            return False
        params = [param for param in pl_module.parameters() if param.requires_grad]
        self.steps.begin(trainer, params, self.coordinates(pl_module))
        return True

    def finish_step(self, trainer: Trainer) -> float:
        """Make the sample of the step that has ended; return the seconds that recording took, to the first caller."""
        found = None if self.steps is None else self.steps.finish(trainer)
        if found is None:
            return 0.0
        self._last, seconds = found
        reason = self.steps.trouble if self.steps is not None and self._last is None else None
        self.trouble = None if reason is None else (trainer.global_step - 1, reason)
        return seconds

    # Gradients of extra batches.

    def _collect(self, trainer: Trainer, pl_module: LightningModule) -> GradientSample:
        coordinates = self.coordinates(pl_module)
        loader: DataLoader[Any] = trainer.train_dataloader  # type: ignore[assignment]  # see `obstacle`
        known_size = self.batch_size or size_of_batches(loader)
        is_drawn = draws_from_all_rows(trainer, loader)
        step, rank, num_ranks = trainer.global_step, trainer.global_rank, trainer.world_size
        generator = torch.Generator().manual_seed(_mixed(self.seed, step, 0))
        torch.manual_seed(_mixed(self.seed, step, rank + 1))  # dropout and augmentation
        num_each = -(-self.num_gradients // num_ranks)
        wide = wide_dtype(param for param in pl_module.parameters() if param.requires_grad)
        shape = num_each, coordinates.num_coordinates + 1
        # NaN where a step returns no loss. The last column is the number of samples.
        table = torch.full(shape, math.nan, dtype=wide, device=pl_module.device)
        with side_effect_free(pl_module, self.train_mode, loader):
            batches = extra_batches(trainer, loader, known_size or 1, num_each, generator)
            with closing(batches):  # ends its workers
                for row, batch in zip(table, batches, strict=False):
                    gradient = gradient_of(trainer, pl_module, batch, self.loss_fn)
                    if gradient is not None:
                        row[:-1] = coordinates.of(gradient)
                        row[-1] = (not is_drawn and num_samples(batch)) or known_size or 1
        table = gather_interleaved(table, num_ranks)  # in the order of the draws
        rows, sizes = table[:, :-1], table[:, -1]
        found, counts = sizes[sizes.isfinite()].unique(return_counts=True)
        # Noise of batches of different sizes cannot be compared: the most common size stays.
        size = int(found[counts.argmax()]) if len(found) else 0
        sample = GradientSample(rows[sizes == size], size, coordinates.layers, step).finite()
        reason = "its gradients are not finite" if len(found) else "the steps return no loss"
        if len(found) and int(counts.max()) < 2:
            reason = "no two batches have the same number of samples"
        self.trouble = None if len(sample.rows) > 1 else (step, reason)
        return sample


def holds_whole_model(trainer: Trainer) -> bool:
    """Return whether every rank holds all parameters, so that gradients and models of ranks can be compared."""
    return trainer.world_size == 1 or isinstance(trainer.strategy, DDPStrategy)


def _mixed(*numbers: int) -> int:
    """Mix several numbers into one seed."""
    seed = 0
    for number in numbers:
        seed = (seed * 1_000_003 + number + 0x9E3779B9) % 2**63
    return seed
