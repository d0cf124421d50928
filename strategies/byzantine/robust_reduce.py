"""Robust reductions of what ranks log and decide."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor

from lightning_sgd._distributed import gather
from lightning_sgd.functional.robust.robust_statistics import (
    finite_median,
    is_majority,
    most_frequent,
)

REDUCTIONS = ("mean", "avg", "sum")
"""Reductions of which there is a robust form."""


class RobustReduce(DDPStrategy):
    """Takes medians over the ranks instead of means, and majorities instead of unanimity, if asked to."""

    robust_metrics = False

    def reduce(
        self, tensor: Tensor, group: Any | None = None, reduce_op: Any | None = "mean"
    ) -> Tensor:
        """Reduce a logged value over the ranks, as DDP does or to the median of the finite values.

        Args:
            tensor: Value of this rank.
            group: Process group; by default of all ranks.
            reduce_op: ``mean`` or ``sum``; others are reduced as in DDP.
        """
        # Lightning passes a word, torch's users an enumeration whose text ends in the word.
        name = str(reduce_op).rsplit(".", 1)[-1].lower()
        is_robust = self.robust_metrics and self.world_size > 1 and name in REDUCTIONS
        if not is_robust or not isinstance(tensor, Tensor):
            return super().reduce(tensor, group, reduce_op)
        rows = self._gather(tensor, group)
        is_floating = tensor.is_floating_point()
        usual = finite_median(rows.double()).to(tensor) if is_floating else most_frequent(rows)
        # A sum of that many usual values: a wrong rank can change it no more than the median.
        return usual * len(rows) if name == "sum" else usual

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:  # noqa: A002  # as in the base
        """Decide by majority if metrics are robust; else as DDP does.

        Args:
            decision: Decision of this rank.
            all: Whether DDP asks for all ranks, or for any.
        """
        if not self.robust_metrics or self.world_size == 1:
            return super().reduce_boolean_decision(decision, all)
        votes = self._gather(torch.tensor(int(decision), device=self.root_device), None)
        return is_majority([bool(vote) for vote in votes])

    def _gather(self, tensor: Tensor, group: Any | None) -> Tensor:
        num_ranks = torch.distributed.get_world_size(group)
        return gather(tensor, num_ranks, group)
