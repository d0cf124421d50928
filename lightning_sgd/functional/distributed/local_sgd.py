r"""Local SGD: the schedule of averages, and the mean of one rank's models.

Between two averages each of n ranks takes H steps of its own optimizer on its own data,

.. math::
    x_i \leftarrow x_i - \gamma_k\, g_i(x_i),

then all of them continue from the mean,

.. math::
    x_i \leftarrow \frac1n \sum_j x_j.

H = 1 is parallel SGD for every optimizer whose step is linear in model, gradient and state (SGD with heavy-ball or
Nesterov momentum and weight decay), because the mean of the steps is the step of the means. H = ∞ with one mean at the
end is one-shot averaging; the mean is then best taken of the tail averages
:math:`\bar x_i = \frac1{T-s}\sum_{k>s} x_i^k`, not of the last iterates.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_sgd._validation import expect, is_whole, plain_number
from lightning_sgd.functional.distributed.flat_buffers import accumulation_dtype

PERIOD_REMEDY = (
    "Give a number of steps, or a table such as {0: 1, 1000: 8}: from which step, which period."
)


class PeriodSchedule:
    """Schedule of averages.

    Args:
        period: Steps from one average to the next [H]; or a table of periods by the step from which they hold; ``None``
            for never.

    Raises:
        ValueError: If a period is below one, or the table does not begin at step 0.

    Example:
        >>> schedule = PeriodSchedule({0: 1, 4: 3})
        >>> due, since = [], 0
        >>> for step in range(1, 11):
        ...     since += 1
        ...     if schedule.is_due(step, since):
        ...         due.append(step)
        ...         since = 0
        >>> due
        [1, 2, 3, 6, 9]
    """

    def __init__(self, period: int | Mapping[int, int] | None) -> None:
        period = plain_number(period)
        table = period if isinstance(period, Mapping) else {0: period}
        periods = [h for h in table.values() if h is not None]
        for h in periods:
            whole = is_whole(h, least=-sys.maxsize)
            expect(whole, "period", "a whole number of steps", h, PERIOD_REMEDY)
        valid = all(h >= 1 for h in periods) and 0 in table
        expect(valid, "period", "at least 1, from step 0 on", period, PERIOD_REMEDY)
        self.table: dict[int, int | None] = dict(sorted(table.items()))

    def period(self, step: int) -> int | None:
        """Return the period that holds at a step, counted from 1."""
        begin = max(begin for begin in self.table if begin <= step)
        return self.table[begin]

    def is_due(self, step: int, num_since: int) -> bool:
        """Tell whether to average after a step.

        Args:
            step: Number of the step, counted from 1.
            num_since: Steps since the last average, this one included.
        """
        period = self.period(step)
        # Counted from the last average and not by the step modulo the period, because the period may change in between.
        return period is not None and num_since >= period


class RunningMean:
    """Running mean of models, in float32 or better.

    Args:
        tensors: Parameters of the model; their present values are not included.

    Example:
        >>> weight = torch.zeros(1)
        >>> mean = RunningMean([weight])
        >>> for value in 1.0, 2.0, 6.0:
        ...     mean.update([weight.fill_(value)])
        >>> mean.values
        [tensor([3.])]
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.count = 0
        self.values = [
            torch.zeros_like(tensor, dtype=accumulation_dtype(tensor.dtype), requires_grad=False)
            for tensor in tensors
        ]

    @torch.no_grad()
    def update(self, tensors: Sequence[Tensor]) -> None:
        """Update the mean by one more model, of the same shapes."""
        self.count += 1
        wide = [x.to(mean.dtype) for x, mean in zip(tensors, self.values, strict=True)]
        # Not a sum, which grows and loses digits; weight one takes the first model over exactly.
        torch._foreach_lerp_(self.values, wide, 1 / self.count)

    def state_dict(self) -> dict[str, Any]:
        """Return the mean and the number of models."""
        return {"count": self.count, "values": self.values}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self.count = state["count"]
        torch._foreach_copy_(self.values, state["values"])
