"""Record the gradients of training itself: of the micro-batches, or of the ranks, of one optimizer step."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch import Tensor, nn

from lightning_sgd._distributed import gather
from lightning_sgd._protocols import HasReplicas
from lightning_sgd._validation import expect
from lightning_sgd.callbacks._monitoring.extra_batches import num_samples
from lightning_sgd.functional.noise.gradient_sample import Columns, GradientSample, wide_dtype

StepSource: TypeAlias = Literal["microbatches", "ranks"]


class StepGradients:
    """Record the gradients of one step while training computes them, and make a sample that all ranks share.

    Lightning's division of the loss and the scale of a GradScaler are undone. Micro-batches that are shorter than
    others of the step are left out, and so are steps whose gradients are not at one point.

    Args:
        source: Whose gradients.
    """

    def __init__(self, source: StepSource) -> None:
        self.source = source
        self._hooks: GradientHooks | None = None
        self._factor = 1.0
        self.trouble: str | None = (
            None  # why the last recorded step has no two gradients, if it is known
        )

    def refuse_single_gradients(self, trainer: Trainer) -> None:
        """Refuse a training with one gradient per step.

        Raises:
            ValueError: If there is no second rank, or no second micro-batch.
        """
        if self.source == "ranks":
            remedy = (
                "Noise is measured by differences between ranks, and there is one rank. On one device take "
                "'microbatches' with accumulate_grad_batches, or 'extra'."
            )
            others = "'extra' or 'microbatches' on a single rank"
            expect(trainer.world_size > 1, "source", others, self.source, remedy)
            return
        changes = any(isinstance(c, GradientAccumulationScheduler) for c in trainer.callbacks)  # type: ignore[attr-defined]  # set by a connector
        num = trainer.accumulate_grad_batches * trainer.world_size
        remedy = "A step is made of one batch. Set accumulate_grad_batches to 2 or more, or take 'extra'."
        others = "'extra' where nothing is accumulated"
        expect(changes or num > 1, "source", others, self.source, remedy)

    @staticmethod
    def obstacle(trainer: Trainer, pl_module: LightningModule) -> str | None:
        """Return the reason why nothing can be recorded in this training; ``None`` if there is none."""
        if not pl_module.automatic_optimization:
            return (
                "in manual optimization it is not known which backward passes belong to one step; take source='extra' "
                "with `loss_fn`"
            )
        if any(isinstance(optimizer, torch.optim.LBFGS) for optimizer in trainer.optimizers):
            return (
                "LBFGS takes several gradients at different points in one step; take source='extra'"
            )
        return None

    def can_begin(self, trainer: Trainer, batch_idx: int) -> bool:
        """Return whether a step of several gradients begins with this batch, at the same weights on all ranks."""
        begins = batch_idx % trainer.accumulate_grad_batches == 0
        return begins and self.num_gradients(trainer) > 1 and _ranks_agree(trainer)

    def num_gradients(self, trainer: Trainer) -> int:
        """Return the number of gradients of a step, on all ranks together."""
        each = trainer.accumulate_grad_batches if self.source == "microbatches" else 1
        return trainer.world_size * each

    def begin(self, trainer: Trainer, params: list[nn.Parameter], columns: Columns) -> None:
        """Record the gradients of the step that begins now, unless another monitor has asked for that already."""
        if self._hooks is not None and self._hooks.step == trainer.global_step:
            return
        self.abandon()
        self._factor = trainer.accumulate_grad_batches / _loss_scale(trainer)
        num_rows, step = trainer.accumulate_grad_batches, trainer.global_step
        self._hooks = GradientHooks(params, columns, num_rows, step)

    def begin_batch(self, trainer: Trainer, batch: Any, batch_idx: int) -> None:
        """Expect the backward pass of the next micro-batch, if its step is recorded."""
        if self._hooks is not None:
            size = num_samples(batch) or getattr(trainer.train_dataloader, "batch_size", None)
            self._hooks.begin_batch(batch_idx % trainer.accumulate_grad_batches, size or 0)

    def set_recording(self, is_on: bool) -> None:
        """Start or stop recording; other callbacks may compute gradients between two backward passes of training."""
        if self._hooks is not None:
            self._hooks.is_recording = is_on

    def finish(self, trainer: Trainer) -> tuple[GradientSample | None, float] | None:
        """Gather what all ranks recorded in the step that has ended; a collective, once for all monitors.

        Returns:
            The sample, if there are two gradients that can be compared, and the seconds that recording took; ``None``
            if another monitor has asked before.
        """
        hooks, self._hooks = self._hooks, None
        if hooks is None:
            return None
        hooks.remove()
        rows, sizes, num_batches = hooks.rows * self._factor, torch.tensor(hooks.sizes), 1
        if self.source == "ranks":
            rows, sizes, num_batches = _mean_of_batches(rows, sizes)
        if hooks.has_moved:
            rows = rows * torch.nan
        # Sizes travel as one more column: a second collective would cost more than these few numbers.
        table = torch.cat([rows, sizes.to(rows)[:, None]], dim=1)
        table = gather_interleaved(table, trainer.world_size)
        rows, sizes = table[:, :-1], table[:, -1]
        size, layers = int(sizes.max()), hooks.columns.layers
        sample = GradientSample(rows[sizes == size], size * num_batches, layers, hooks.step)
        is_measured = not hooks.has_moved and len(sample.rows) > 1
        sample = sample.finite()
        is_lost = is_measured and len(sample.rows) < 2
        self.trouble = "its gradients are not finite" if is_lost else None
        return sample if size > 0 and len(sample.rows) > 1 else None, hooks.seconds

    def abandon(self) -> None:
        """Remove the hooks: the step that began will not be finished."""
        if self._hooks is not None:
            self._hooks.remove()
        self._hooks = None


class GradientHooks:
    """Record what each backward pass of one optimizer step adds to ``.grad``, one row per micro-batch.

    Hooks on the parameters see a gradient before it is added to ``.grad``, and before DDP reduces it. So rows are
    exact, also that of the last micro-batch of a step, in which DDP synchronises. The hooks return nothing, which
    leaves training as it is, bit for bit.

    Args:
        params: The trained parameters.
        columns: What is kept of a gradient.
        num_rows: Micro-batches of a complete step.
        step: Optimizer steps so far.

    Attributes:
        rows: Shape (num_rows, s); NaN where there was no backward pass.
        sizes: Samples of each micro-batch; 0 where there was none.
        is_recording: Whether a backward pass of training is running.
        has_moved: Whether weights changed between the backward passes, as LBFGS or SAM change them.
        seconds: Time spent in the hooks.
    """

    def __init__(
        self, params: Sequence[nn.Parameter], columns: Columns, num_rows: int, step: int
    ) -> None:
        self.columns, self.step = columns, step
        self.sizes = [0] * num_rows
        shape, wide = (num_rows, columns.num_coordinates), wide_dtype(params)
        self.rows = torch.full(shape, math.nan, dtype=wide, device=params[0].device)
        self.is_recording, self.has_moved, self.seconds = False, False, 0.0
        self._row, self._is_empty = 0, True
        self._parts = list(columns.layers.values())
        self._versions = [param._version for param in params]
        self._handles = [
            param.register_hook(partial(self._record, number, param))
            for number, param in enumerate(params)
        ]

    def begin_batch(self, number: int, size: int) -> None:
        """Expect the backward pass of the micro-batch ``number`` of the step, which has ``size`` samples."""
        self._row, self.sizes[number], self._is_empty = number, size, True

    def remove(self) -> None:
        """Remove the hooks from the parameters."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _record(self, number: int, param: nn.Parameter, gradient: Tensor) -> None:
        if not self.is_recording:
            return
        begin = time.perf_counter()
        self.has_moved |= param._version != self._versions[number]
        row = self.rows[self._row]
        if self._is_empty:
            row.zero_()  # a parameter that the loss does not use has no gradient
            self._is_empty = False
        # Added, because a pass in several pieces, as with activation checkpointing, calls this hook several times.
        row[self._parts[number]] += self.columns.part(number, gradient).to(row.device)
        self.seconds += time.perf_counter() - begin


def gather_interleaved(rows: Tensor, num_ranks: int) -> Tensor:
    """Gather as many rows from every rank: the first of each rank, then the second of each rank, and so on."""
    return gather(rows, num_ranks).transpose(0, 1).flatten(0, 1)


def _mean_of_batches(rows: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor, int]:
    """Return the mean row (NaN if sizes differ), the size of one micro-batch, and the number of micro-batches."""
    num_batches = int((sizes > 0).sum())
    is_even = bool((sizes[:num_batches] == sizes[0]).all())
    mean = rows[:num_batches].mean(dim=0, keepdim=True)
    return mean if is_even else mean * torch.nan, sizes[:1], num_batches


def _ranks_agree(trainer: Trainer) -> bool:
    """Return whether all ranks have the same weights; without other evidence, as under DDP, they have."""
    strategy = trainer.strategy
    if trainer.world_size == 1 or not isinstance(strategy, HasReplicas):
        return True
    return all(replica.is_shared for replica in strategy.replicas)


def _loss_scale(trainer: Trainer) -> float:
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return 1.0 if scaler is None else float(scaler.get_scale())
