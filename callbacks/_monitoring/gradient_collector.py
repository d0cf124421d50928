"""Gathers several gradients at the same weights, once for all monitors that ask for the same."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias, get_args

import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader

from lightning_sgd._validation import expect, warn_no_effect
from lightning_sgd.callbacks._gathering import gather
from lightning_sgd.callbacks._monitoring.extra_batches import (
    LossFunction,
    draw_batch,
    gradient_of,
    measuring,
    obstacle_to_own_batches,
)
from lightning_sgd.callbacks._monitoring.step_gradients import StepGradients
from lightning_sgd.callbacks._traffic_source import holds_whole_model
from lightning_sgd.functional.noise.gradient_sample import (
    Columns,
    Coordinates,
    GradientSample,
    wide_dtype,
)
from lightning_sgd.functional.noise.gradient_sketch import CountSketch

__all__ = ["GradientCollector", "GradientSource", "LossFunction"]

GradientSource: TypeAlias = Literal["extra", "microbatches", "ranks"]


class GradientCollector:
    """Takes gradients of several batches at the weights as they are, the same on all ranks.

    With the source ``extra``, batches of its own are drawn with replacement, by a generator that depends on ``seed``
    and step alone, so that nothing of it is in a checkpoint. Ranks share the work. Gradients come from
    ``torch.autograd.grad``: ``.grad``, the hooks of DDP and a GradScaler see nothing of it. Buffers, attributes and
    metrics of the module are put back, also after an exception; random states are kept by the monitor.

    The two other sources take no pass of their own. ``microbatches`` are the gradients of the batches that one
    optimizer step accumulates, on all ranks; ``ranks`` are the gradients of one step that each rank has before they are
    reduced. They are caught in the backward passes of that step, between :meth:`begin_step` and :meth:`finish_step`.
    Ranks with weights of their own, as in Local SGD, are caught in steps that all begin with the same weights.

    Memory: the sample, this rank's share of it, and with ``extra`` one gradient.

    Attributes:
        settings: What two collectors must have in common to give the same sample.
        steps: Catches the gradients of training; ``None`` with ``extra``.

    Args:
        num_gradients: How many, over all ranks [m], with ``extra``; rounded up to the same number on each.
        num_coordinates: About how many numbers of each to keep [s]; ``None`` for all.
        batch_size: Samples per gradient with ``extra``; by default that of the training data loader.
        train_mode: Whether dropout and batch statistics are as in training, or as in evaluation.
        loss_fn: Takes module and batch and returns the loss; by default what ``training_step`` returns.
        seed: Decides on coordinates and batches.
        source: Where gradients come from.
        sketch: Keep a sketch, which has the norms of whole gradients, instead of some coordinates.
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
        remedy = "Noise is in differences between gradients."
        expect(num_gradients >= 2, "num_gradients", "at least 2", num_gradients, remedy)
        for name, value in (("num_coordinates", num_coordinates), ("batch_size", batch_size)):
            remedy = "None takes all coordinates, or the batch size of training."
            expect(value is None or value >= 1, name, "at least 1", value, remedy)
        known = get_args(GradientSource)
        remedy = "The default is 'extra', passes of its own."
        expect(source in known, "source", f"one of {', '.join(known)}", source, remedy)
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
        self._last: GradientSample | None = None
        self._columns: tuple[dict[str, int], Columns] | None = None

    @property
    def takes_passes(self) -> bool:
        """Whether gradients come from passes of its own, between steps, or else from the steps themselves."""
        return self.source == "extra"

    def shared(self, trainer: Trainer) -> GradientCollector:
        """The first collector among the callbacks of a Trainer that has the same settings.

        Args:
            trainer: Knows the callbacks.
        """
        others = (getattr(callback, "collector", None) for callback in trainer.callbacks)  # type: ignore[attr-defined]  # set by a connector
        mine = self.settings
        same = (c for c in others if isinstance(c, GradientCollector) and c.settings == mine)
        return next(same, self)

    def obstacle(self, trainer: Trainer, pl_module: LightningModule) -> str | None:
        """Why nothing can be collected in this training; ``None`` if something can.

        Args:
            trainer: About to train.
            pl_module: The module.
        """
        if not holds_whole_model(trainer):
            return f"{type(trainer.strategy).__name__} keeps no rank a whole gradient"
        if self.steps is not None:
            return self.steps.obstacle(trainer, pl_module)
        obstacle = obstacle_to_own_batches(trainer, pl_module, self.loss_fn)
        if obstacle is None and self._size_of_batch(trainer) is None:
            return "the data loader does not tell its batch size; set `batch_size`"
        return obstacle

    def describe(self, trainer: Trainer, pl_module: LightningModule) -> str:
        """What is gathered, and how much memory it takes, for the line at the start.

        Args:
            trainer: Knows ranks and accumulated batches.
            pl_module: The module.
        """
        num, ranks = self.coordinates(pl_module).num_coordinates, trainer.world_size
        k, wide = trainer.accumulate_grad_batches, wide_dtype(pl_module.parameters()).itemsize
        if self.steps is None:
            rows, caught = self.num_gradients, 0
            what = f"{rows} gradients of batches of its own"
        else:
            rows, caught = self.steps.num_gradients(trainer), k
            of_ranks = f" on each of {ranks} ranks" if ranks > 1 else ""
            what = f"gradients of the {k} micro-batches of a step{of_ranks}"
            what = (
                what
                if self.source == "microbatches"
                else f"the gradients of a step on {ranks} ranks"
            )
        unit = "numbers of a sketch" if self.sketch else "coordinates"
        return f"{what}, {num} {unit}, {1e-6 * wide * (rows + caught) * num:.3g} MB"

    def forget(self) -> None:
        """Free the last sample, and take hooks off."""
        self._last, self._columns = None, None
        if self.steps is not None:
            self.steps.abandon()

    def sample(self, trainer: Trainer, pl_module: LightningModule) -> GradientSample | None:
        """Gradients at one point, the same on all ranks; ``None`` where there is an obstacle.

        With ``extra`` the point is where the weights are; a second monitor that asks at the same step gets what the
        first one got. Otherwise the point is where the step that just ended began, if it was caught.

        Args:
            trainer: Knows ranks, data and precision.
            pl_module: The module.
        """
        if not self.takes_passes:
            caught = self._last is not None and self._last.step + 1 == trainer.global_step
            return self._last if caught else None
        if self.obstacle(trainer, pl_module) is not None:
            return None
        if self._last is None or self._last.step != trainer.global_step:
            self._last = self._collect(trainer, pl_module)
        return self._last

    def coordinates(self, pl_module: LightningModule) -> Columns:
        """What is kept of a gradient of the parameters that are trained.

        Args:
            pl_module: The module.
        """
        sizes = {
            name.replace("_orig_mod.", ""): param.numel()
            for name, param in pl_module.named_parameters()
            if param.requires_grad
        }
        if self._columns is None or self._columns[0] != sizes:
            kind = CountSketch if self.sketch else Coordinates
            self._columns = sizes, kind(sizes, self.num_coordinates, self.seed)
        return self._columns[1]

    def begin_step(self, trainer: Trainer, pl_module: LightningModule, batch_idx: int) -> bool:
        """Catch the gradients of the optimizer step that begins now; whether one begins and can be caught.

        Args:
            trainer: Before a batch.
            pl_module: The module.
            batch_idx: Of the batch.
        """
        if self.steps is None or not self.steps.can_begin(trainer, batch_idx):
            return False
        if self.obstacle(trainer, pl_module) is not None:
            return False
        params = [param for param in pl_module.parameters() if param.requires_grad]
        self.steps.begin(trainer, params, self.coordinates(pl_module))
        return True

    def finish_step(self, trainer: Trainer) -> float:
        """Make a sample of the step that has ended; the seconds that catching it took, told once.

        Args:
            trainer: After the step.
        """
        found = None if self.steps is None else self.steps.finish(trainer)
        if found is None:
            return 0.0
        self._last, seconds = found
        return seconds

    # Gradients of batches of its own.

    def _collect(self, trainer: Trainer, pl_module: LightningModule) -> GradientSample:
        coordinates = self.coordinates(pl_module)
        loader: DataLoader[Any] = trainer.train_dataloader  # type: ignore[assignment]  # see `obstacle`
        size = self._size_of_batch(trainer)
        assert size is not None
        step, rank, num_ranks = trainer.global_step, trainer.global_rank, trainer.world_size
        generator = torch.Generator().manual_seed(_mixed(self.seed, step, 0))
        torch.manual_seed(_mixed(self.seed, step, rank + 1))  # dropout and augmentation
        num_each = -(-self.num_gradients // num_ranks)
        rows = []
        with measuring(pl_module, self.train_mode):
            for number in range(num_each * num_ranks):
                batch = draw_batch(trainer, loader, size, generator)
                if number % num_ranks == rank:
                    gradient = gradient_of(trainer, pl_module, batch(), self.loss_fn)
                    rows.append(coordinates.of(gradient))
        table = gather(torch.stack(rows), num_ranks)
        return GradientSample(table, size, coordinates.layers, step).finite()

    def _size_of_batch(self, trainer: Trainer) -> int | None:
        loader = trainer.train_dataloader
        sampler = getattr(getattr(loader, "batch_sampler", None), "batch_size", None)
        return self.batch_size or getattr(loader, "batch_size", None) or sampler


def _mixed(*numbers: int) -> int:
    """One seed of several numbers, different for different ones."""
    seed = 0
    for number in numbers:
        seed = (seed * 1_000_003 + number + 0x9E3779B9) % 2**63
    return seed
