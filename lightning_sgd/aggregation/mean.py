"""The plain mean, as a control."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lightning_sgd.aggregation._aggregator import CoordinateRule
from lightning_sgd.functional.robust.stacked_rows import combine


class Mean(CoordinateRule):
    r"""The mean of the rows, :math:`\sum_i w_i x_i / \sum_i w_i`; one arbitrary row makes it arbitrary.

    Rows that are not finite are left out, up to ``num_byzantine`` of them, so that one broken host does no harm.

    Cost: one pass over the rows.

    Args:
        num_byzantine: How many rows may be left out [f].
        worker_weights: Weight of each worker, such as its batch size; equal by default.

    Example:
        >>> import torch
        >>> Mean()(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        tensor([2., 3.])
    """

    def __init__(
        self, num_byzantine: int = 0, worker_weights: Sequence[float] | None = None
    ) -> None:
        super().__init__(num_byzantine)
        self._weigh_workers(worker_weights)

    def reduce(self, block: Tensor, num_byzantine: int) -> Tensor:
        """Return the mean of each column."""
        return combine(self._shares(len(block))[None], block)[0]
