"""What ranks log and decide, combined so that a few wrong ones do not matter."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor

from lightning_sgd.functional.robust.robust_statistics import (
    finite_median,
    is_majority,
    most_frequent,
)

REDUCTIONS = ("mean", "avg", "sum")
"""Those of which there is a robust form."""


class RobustReduce(DDPStrategy):
    """Medians over the ranks instead of means, majorities instead of unanimity, where asked for."""

    robust_metrics = False

    def reduce(
        self, tensor: Tensor, group: Any | None = None, reduce_op: Any | None = "mean"
    ) -> Tensor:
        """What was logged, over the ranks: as DDP does, or medians of the finite values.

        Args:
            tensor: This rank's.
            group: Of ranks; all by default.
            reduce_op: ``mean`` or ``sum``; others are as DDP's.
        """
        name = str(reduce_op).rsplit(".", 1)[-1].lower()
        is_robust = self.robust_metrics and self.world_size > 1 and name in REDUCTIONS
        if not is_robust or not isinstance(tensor, Tensor):
            return super().reduce(tensor, group, reduce_op)
        rows = self._of_all_ranks(tensor, group)
        is_floating = tensor.is_floating_point()
        usual = finite_median(rows.double()).to(tensor) if is_floating else most_frequent(rows)
        return usual * len(rows) if name == "sum" else usual

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:  # noqa: A002  # as in the base
        """Whether to do something: if all ranks say so, or any; or the majority.

        Args:
            decision: This rank's.
            all: Whether all or any.
        """
        if not self.robust_metrics or self.world_size == 1:
            return super().reduce_boolean_decision(decision, all)
        votes = self._of_all_ranks(torch.tensor(int(decision), device=self.root_device), None)
        return is_majority([bool(vote) for vote in votes])

    def _of_all_ranks(self, tensor: Tensor, group: Any | None) -> Tensor:
        # Not by Lightning's `all_gather`, which calls what torch has deprecated.
        rows = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
        dist.all_gather(rows, tensor.contiguous(), group=group)
        return torch.stack(rows)
