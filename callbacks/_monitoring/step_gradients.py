"""Gradients of training itself: those of the micro-batches or of the ranks of one optimizer step."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_sgd._validation import expect
from lightning_sgd.callbacks._gathering import gather
from lightning_sgd.callbacks._monitoring.gradient_hooks import GradientHooks
from lightning_sgd.functional.noise.gradient_sample import Columns, GradientSample

StepSource: TypeAlias = Literal["microbatches", "ranks"]


class StepGradients:
    """Catches the gradients of a step while it is made, and makes a sample of them that all ranks share.

    Lightning's division of the loss and the scale of a GradScaler are undone. Batches that are shorter than others of
    the step are left out, and so are steps whose gradients are not at one point.

    Args:
        source: Whose gradients.
    """

    def __init__(self, source: StepSource) -> None:
        self.source = source
        self._tap: GradientHooks | None = None
        self._factor = 1.0

    def refuse_single_gradients(self, trainer: Trainer) -> None:
        """Refuse a training with one gradient for each step.

        Args:
            trainer: Knows ranks and accumulated batches.

        Raises:
            ValueError: If there is no second rank, or no second micro-batch.
        """
        if self.source == "ranks":
            remedy = (
                "Noise is in differences between ranks, and there is one. On one device take 'microbatches' with "
                "accumulate_grad_batches, or 'extra'."
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
        """Why nothing can be caught; ``None`` if something can.

        Args:
            trainer: About to train.
            pl_module: The module.
        """
        if not pl_module.automatic_optimization:
            return (
                "in manual optimization nobody knows which backward passes belong to one step; take source='extra' "
                "with `loss_fn`"
            )
        if any(isinstance(optimizer, torch.optim.LBFGS) for optimizer in trainer.optimizers):
            return (
                "LBFGS takes several gradients at different points in one step; take source='extra'"
            )
        return None

    def can_begin(self, trainer: Trainer, batch_idx: int) -> bool:
        """Whether a step begins, which all ranks begin with the same weights, with more than one gradient.

        Args:
            trainer: Before a batch.
            batch_idx: Of the batch.
        """
        begins = batch_idx % trainer.accumulate_grad_batches == 0
        return begins and self.num_gradients(trainer) > 1 and _ranks_agree(trainer)

    def num_gradients(self, trainer: Trainer) -> int:
        """How many gradients a step has, on all ranks.

        Args:
            trainer: Knows ranks and accumulated batches.
        """
        each = trainer.accumulate_grad_batches if self.source == "microbatches" else 1
        return trainer.world_size * each

    def begin(self, trainer: Trainer, params: list[nn.Parameter], columns: Columns) -> None:
        """Catch the gradients of the step that begins now, if that has not been done for another monitor.

        Args:
            trainer: Before the first batch of the step.
            params: What is trained.
            columns: What is kept of a gradient.
        """
        if self._tap is not None and self._tap.step == trainer.global_step:
            return
        self.abandon()
        self._factor = trainer.accumulate_grad_batches / _loss_scale(trainer)
        num_rows, step = trainer.accumulate_grad_batches, trainer.global_step
        self._tap = GradientHooks(params, columns, num_rows, step)

    def begin_batch(self, trainer: Trainer, batch: Any, batch_idx: int) -> None:
        """Take note of the next batch of the step, if it is caught.

        Args:
            trainer: Knows how many batches are accumulated.
            batch: Tells its size by its first tensor, else the loader does.
            batch_idx: Its place in the epoch.
        """
        if self._tap is not None:
            size = _num_samples(batch) or getattr(trainer.train_dataloader, "batch_size", None)
            self._tap.begin_batch(batch_idx % trainer.accumulate_grad_batches, size or 0)

    def listen(self, is_open: bool) -> None:
        """Take note of whether a backward pass of training is going on.

        Args:
            is_open: Whether it is.
        """
        if self._tap is not None:
            self._tap.open(is_open)

    def finish(self, trainer: Trainer) -> tuple[GradientSample | None, float] | None:
        """Exchange what was caught in the step that has ended; a collective, once for all monitors.

        Args:
            trainer: After the step.

        Returns:
            The sample, if there are two gradients that can be compared, and the seconds that catching has taken;
            ``None`` if that was asked before.
        """
        tap, self._tap = self._tap, None
        if tap is None:
            return None
        tap.close()
        rows, sizes, num_batches = tap.rows * self._factor, torch.tensor(tap.sizes), 1
        if self.source == "ranks":
            rows, sizes, num_batches = _mean_of_batches(rows, sizes)
        if tap.has_moved:
            rows = rows * torch.nan
        table = gather(torch.cat([rows, sizes.to(rows)[:, None]], dim=1), trainer.world_size)
        rows, sizes = table[:, :-1], table[:, -1]
        size, layers = int(sizes.max()), tap.columns.layers
        sample = GradientSample(rows[sizes == size], size * num_batches, layers, tap.step).finite()
        return sample if size > 0 and len(sample.rows) > 1 else None, tap.seconds

    def abandon(self) -> None:
        """Take hooks off: the step that began is not going to end."""
        if self._tap is not None:
            self._tap.close()
        self._tap = None


def _mean_of_batches(rows: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor, int]:
    """One row of as many micro-batches as there were, NaN if their sizes differ; the size of one of them."""
    num_batches = int((sizes > 0).sum())
    is_even = bool((sizes[:num_batches] == sizes[0]).all())
    mean = rows[:num_batches].mean(dim=0, keepdim=True)
    return mean if is_even else mean * torch.nan, sizes[:1], num_batches


def _ranks_agree(trainer: Trainer) -> bool:
    """Whether all ranks have the same weights; strategies of our own know it."""
    replicas = getattr(trainer.strategy, "replicas", ())
    return trainer.world_size == 1 or all(replica.is_shared for replica in replicas)


def _loss_scale(trainer: Trainer) -> float:
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return 1.0 if scaler is None else float(scaler.get_scale())


def _num_samples(batch: Any) -> int | None:
    leaves = tree_leaves(batch)
    return next((len(x) for x in leaves if isinstance(x, Tensor) and x.ndim), None)
