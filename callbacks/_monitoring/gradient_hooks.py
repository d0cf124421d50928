"""Catches the gradients of this rank while the backward passes of one optimizer step make them."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from lightning_sgd.functional.noise.gradient_sample import Columns, wide_dtype


class GradientHooks:
    """One row for each micro-batch of a step: what its backward pass adds to ``.grad``.

    Hooks on the parameters see a gradient before it is added to what is there, and before DDP reduces it. So there is
    nothing to subtract and nothing to undo: rows are exact, also that of the last micro-batch of a step, in which DDP
    synchronises. The hooks return nothing, so that training goes on with the very same numbers.

    Args:
        params: What is trained.
        columns: What is kept of a gradient.
        num_rows: Micro-batches of a complete step.
        step: Optimizer steps so far.

    Attributes:
        rows: Shape (num_rows, s); NaN where there was no backward pass.
        sizes: Samples of each micro-batch; 0 where there was none.
        step: As given.
        columns: As given.
        has_moved: Whether weights changed between the backward passes, as LBFGS or SAM do it.
        seconds: What the hooks took.
    """

    def __init__(
        self, params: Sequence[nn.Parameter], columns: Columns, num_rows: int, step: int
    ) -> None:
        self.step, self.has_moved = step, False
        self.sizes = [0] * num_rows
        shape, wide = (num_rows, columns.num_coordinates), wide_dtype(params)
        self.rows = torch.full(shape, math.nan, dtype=wide, device=params[0].device)
        self.seconds = 0.0
        self.columns, self._row = columns, 0
        self._is_open, self._is_empty = False, True
        self._parts = list(columns.layers.values())
        self._versions = [param._version for param in params]
        self._handles = [
            param.register_hook(partial(self._take, number, param))  # type: ignore[no-untyped-call]  # torch leaves it without types
            for number, param in enumerate(params)
        ]

    def begin_batch(self, number: int, size: int) -> None:
        """Expect the backward pass of a micro-batch.

        Args:
            number: Its place in the step.
            size: Its samples.
        """
        self._row, self.sizes[number], self._is_empty = number, size, True

    def open(self, is_open: bool = True) -> None:
        """Listen, or not: other callbacks may take gradients of their own between two backward passes.

        Args:
            is_open: Whether a backward pass of training is going on.
        """
        self._is_open = is_open

    def close(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _take(self, number: int, param: nn.Parameter, gradient: Tensor) -> None:
        if not self._is_open:
            return
        begin = time.perf_counter()
        self.has_moved |= param._version != self._versions[number]
        row = self.rows[self._row]
        if self._is_empty:
            row.zero_()  # a parameter that is not used has no gradient
            self._is_empty = False
        # Added: a pass made of several, as with checkpoints of activations, comes here several times.
        row[self._parts[number]] += self.columns.part(number, gradient).to(row.device)
        self.seconds += time.perf_counter() - begin
