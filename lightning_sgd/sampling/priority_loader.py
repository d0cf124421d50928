"""A DataLoader over a priority sampler, made from the DataLoader that a user has."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)

from lightning_sgd._validation import Words, expect, warn_at_user_line
from lightning_sgd.sampling.batch_rows import BatchRows, FollowedCollate
from lightning_sgd.sampling.priority_sampler import PriorityBatchSampler, PrioritySampler

KEPT = (
    "num_workers",
    "collate_fn",
    "pin_memory",
    "timeout",
    "worker_init_fn",
    "multiprocessing_context",
    "generator",
    "prefetch_factor",
    "persistent_workers",
)


class PriorityDataLoader(DataLoader[Any]):
    """Load the batches that a sampler draws, and draw each exactly once, with any number of workers.

    With each batch comes which of the drawn samples its rows belong to, whatever the ``collate_fn`` does; that is kept
    in :attr:`arrived`, and the batch is handed out as it is.

    A second iteration while an epoch runs, as monitors need it, returns the data in their order, and draws nothing.

    Args:
        dataset: The data that the sampler draws from.
        sampler: Draws the batches.
        **kwargs: Passed on to ``torch.utils.data.DataLoader``.
    """

    def __init__(self, dataset: Any, sampler: PrioritySampler, **kwargs: Any) -> None:
        super().__init__(dataset, batch_size=sampler.batch_size, sampler=sampler, **kwargs)
        self._batches = PriorityBatchSampler(sampler)
        self.arrived: deque[BatchRows] = deque()
        """The rows of each batch that was handed out and not looked up yet, in the order of the draws."""
        self._running_epoch: int | None = None
        self._warned = False

    @property
    def priorities(self) -> PrioritySampler:
        """The sampler."""
        return self._batches.sampler

    def __len__(self) -> int:
        """The number of batches of an epoch."""
        return len(self._batches)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # torch names its private iterator
        # A generator: Lightning makes the iterator of a resumed epoch before it calls `set_epoch`, and workers would
        # prefetch in the order of another epoch.
        epoch = self.priorities.epoch
        if self._running_epoch == epoch:
            yield from self._in_order()
            return
        self._running_epoch = epoch
        self.arrived.clear()
        try:
            for followed in super().__iter__():
                self._note(followed.rows)
                yield followed.batch
        finally:
            self._running_epoch = None if self._running_epoch == epoch else self._running_epoch

    def state_dict(self) -> dict[str, int]:
        """Return the number of the epoch; the owner of the sampler keeps its state."""
        return {"epoch": self.priorities.epoch}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Do nothing: the position belongs to the sampler."""

    @property
    def _index_sampler(self) -> PriorityBatchSampler:
        # torch's iterators read their batches of indices from here.
        return self._batches

    def _get_iterator(self) -> Any:
        # torch's iterators keep the function that they find here; the attribute stays the user's.
        users = self.collate_fn
        self.collate_fn = FollowedCollate(users)
        try:
            return super()._get_iterator()
        finally:
            self.collate_fn = users

    def _note(self, rows: BatchRows) -> None:
        check_rows(rows)
        if not rows.is_known and not self._warned:
            self._warned = True
            warn_at_user_line(
                "PrioritySampling cannot tell whether `collate_fn` keeps the order of its samples, and assumes that it "
                "does. If it sorts, drops or mixes them, do that in the data set or in `training_step` instead."
            )
        self.arrived.append(rows)

    def _in_order(self) -> DataLoader[Any]:
        return DataLoader(
            self.dataset,
            self.batch_size,
            collate_fn=self.collate_fn,
            generator=torch.Generator(),
        )


def check_rows(rows: BatchRows) -> None:
    """Refuse a batch whose rows do not belong to one sample each.

    Raises:
        ValueError: Names what the ``collate_fn`` did.
    """
    remedy = "Mix samples in `training_step` or `on_after_batch_transfer`, or leave PrioritySampling out."
    expected = "one that makes every row of one sample"
    expect(not rows.problem, "collate_fn", expected, Words(rows.problem), remedy)


def with_priorities(
    loader: object, make_sampler: Callable[[Any, int, bool], PrioritySampler], num_ranks: int = 1
) -> PriorityDataLoader:
    """Make the same loader with another sampler.

    Args:
        loader: The loader of the user; one that has a priority sampler already keeps it.
        make_sampler: Called with data set, batch size and whether to drop an incomplete batch.
        num_ranks: Number of ranks that share the data.

    Raises:
        ValueError: If it cannot be taken apart.
    """
    checked = _checked(loader, num_ranks)
    if isinstance(checked, PriorityDataLoader):
        return checked
    sampler = checked.sampler
    if not isinstance(sampler, PrioritySampler):
        assert checked.batch_size is not None
        sampler = make_sampler(checked.dataset, checked.batch_size, checked.drop_last)
    kept = {name: getattr(checked, name) for name in KEPT}
    return PriorityDataLoader(checked.dataset, sampler, **kept)


def _checked(loader: object, num_ranks: int) -> DataLoader[Any]:
    if not isinstance(loader, DataLoader):
        raise ValueError(
            f"Expected `train_dataloader` to be one DataLoader for priority sampling, got {type(loader).__name__}. "
            "Combine the data sets with torch.utils.data.ConcatDataset instead."
        )
    expect(
        not isinstance(loader.dataset, IterableDataset),
        "dataset",
        "one with indices",
        type(loader.dataset).__name__,
        "Priorities belong to samples that can be asked for again; a stream has none.",
    )
    expect(
        type(loader.batch_sampler) is BatchSampler and loader.batch_size is not None,
        "batch_sampler",
        "the plain one of a DataLoader with `batch_size`",
        type(loader.batch_sampler).__name__,
        "Priority sampling decides itself what is in a batch.",
    )
    expect(
        not _own_methods(type(loader)),
        "train_dataloader",
        "a DataLoader without an iterator or a length of its own",
        type(loader).__name__,
        "Priority sampling replaces the iterator; change batches in `on_before_batch_transfer` instead.",
    )
    expect(
        getattr(loader, "in_order", True),
        "in_order",
        "true",
        False,
        "Batches must arrive in the order in which they were drawn.",
    )
    _check_sampler(loader.sampler, loader.dataset, num_ranks)
    return loader


def _own_methods(loader_class: type) -> set[str]:
    """Name the methods by which a class of the user makes its batches, and which would be lost."""
    names = ("__iter__", "__len__", "_get_iterator")
    own = [
        cls for cls in loader_class.__mro__ if issubclass(cls, DataLoader) and cls is not DataLoader
    ]
    # The position of a ResumableDataLoader is kept by the sampler instead.
    users = [cls for cls in own if not cls.__module__.startswith("lightning_sgd.")]
    return {name for name in names for cls in users if name in vars(cls)}


def _check_sampler(sampler: object, dataset: Any, num_ranks: int) -> None:
    takes_all = isinstance(sampler, (DistributedSampler, SequentialSampler)) or (
        isinstance(sampler, RandomSampler)
        and not sampler.replacement
        and sampler.num_samples == len(dataset)
    )
    expect(
        takes_all,
        "sampler",
        "one that takes every sample once per epoch",
        type(sampler).__name__,
        "It is replaced, so what it leaves out has to be left out by torch.utils.data.Subset.",
    )
    if isinstance(sampler, DistributedSampler):
        expect(
            sampler.num_replicas == num_ranks,
            "num_replicas",
            f"the number of ranks, {num_ranks}",
            sampler.num_replicas,
            "All ranks must hold the same data set, which priority sampling deals out.",
        )
