"""Which drawn sample each row of a batch belongs to, and how that travels with the batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import default_collate
from torch.utils.data._utils.pin_memory import pin_memory

from lightning_sgd.sampling.collate_follower import CollateFollower


@dataclass(frozen=True, slots=True)
class BatchRows:
    """The samples of the rows of a batch, as positions in the list of drawn samples.

    Attributes:
        num_items: How many samples the ``collate_fn`` got.
        order: Position of the sample of each row; ``None`` where every sample has one row, in the order of the draw.
        is_known: Whether that was found out, not assumed.
        problem: Why the rows cannot be assigned to samples; empty where they can.
    """

    num_items: int
    order: tuple[int, ...] | None = None
    is_known: bool = True
    problem: str = ""

    def __len__(self) -> int:
        """The number of rows."""
        return self.num_items if self.order is None else len(self.order)

    def of_rows(self, values: Tensor) -> Tensor:
        """Select the value of each row from one value per drawn sample."""
        return values if self.order is None else values[self._index(values)]

    def of_samples(self, values: Tensor, missing: float) -> Tensor:
        """Assign the values of the rows to the drawn samples.

        Args:
            values: One for each row.
            missing: For samples without a row. A sample with several rows gets their mean.
        """
        if self.order is None:
            return values
        index = self._index(values)
        sums = values.new_zeros(self.num_items).index_add_(0, index, values)
        counts = values.new_zeros(self.num_items).index_add_(0, index, torch.ones_like(values))
        return torch.where(counts > 0, sums / counts, missing)

    def _index(self, like: Tensor) -> Tensor:
        return torch.tensor(self.order, dtype=torch.int64, device=like.device)


@dataclass(slots=True)
class FollowedBatch:
    """A batch on its way from a worker, with its rows."""

    batch: Any
    rows: BatchRows

    def pin_memory(self) -> FollowedBatch:
        """Pin the batch; the thread of the data loader calls this."""
        pinned = pin_memory(self.batch)
        return FollowedBatch(pinned, self.rows)


class FollowedCollate:
    """Call a ``collate_fn``, and find out which sample each row of its batch belongs to.

    Args:
        collate: The user's. It gets the same arguments as without.
    """

    def __init__(self, collate: Callable[[Any], Any]) -> None:
        # Workers prefetch while the loader's own function is wrapped, and the first draw may measure all scores by it.
        inner: Any = collate
        self.collate: Callable[[Any], Any] = (
            inner.collate if isinstance(inner, FollowedCollate) else inner
        )

    def __call__(self, items: Any) -> FollowedBatch:
        """Collate items that a data set returned for the indices of a batch."""
        if self.collate is default_collate:
            return FollowedBatch(self.collate(items), BatchRows(len(items)))
        if not isinstance(items, list):
            # `__getitems__` of the data set has made a batch.
            batch = self.collate(items)
            return FollowedBatch(batch, BatchRows(0, is_known=batch is items))
        num = len(items)
        follower = CollateFollower(items)
        with follower:
            batch = self.collate(items)
        if batch is None or num == 1:
            return FollowedBatch(batch, BatchRows(num))
        order = follower.order_of(batch)
        if follower.merges:
            return FollowedBatch(batch, BatchRows(num, problem="rows that mix several samples"))
        if order is None:
            return FollowedBatch(batch, BatchRows(num, is_known=False))
        in_order = order == list(range(num))
        return FollowedBatch(batch, BatchRows(num, None if in_order else tuple(order)))
