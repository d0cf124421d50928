"""A DataLoader whose position within the epoch is part of the checkpoint."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

from lightning.pytorch.loops.fit_loop import _FitLoop as FitLoop
from torch.utils.data import DataLoader, Dataset, IterableDataset, SequentialSampler

from lightning_sgd._validation import expect, warn_at_user_line

if TYPE_CHECKING:
    from types import FrameType

T_co = TypeVar("T_co", covariant=True)


class ResumableDataLoader(DataLoader[T_co]):
    """A DataLoader that continues with the very next batch after a restart in the middle of an epoch.

    Lightning saves and restores the position by itself, since the loader has :meth:`state_dict` and
    :meth:`load_state_dict`. The batches that are already done are skipped as lists of indices: nothing is loaded for
    them. Prefetched batches that were not handed out yet do not count.

    The order of an epoch must follow from its number alone. It needs a sampler with ``set_epoch``, which Lightning
    calls, such as ``torch.utils.data.DistributedSampler``, which also serves one process; or no shuffling at all. All
    ranks are at the same position, so the state of one of them is enough.

    Three limits come from Lightning. A checkpoint written while a batch is in work, such as one on an exception, counts
    that batch as done; save after it. With ``max_steps``, a run resumed from a checkpoint of ``on_train_epoch_end``
    counts that epoch twice; save at a step. And the position is lost when the loaders are set up before the checkpoint
    is read, as ``trainer.estimated_stepping_batches`` does in ``configure_optimizers``; then the data module must keep
    the loader's state too, as :class:`~lightning_sgd.DigitsDataModule` does.

    Args:
        dataset: A data set with ``__getitem__`` and ``__len__``.
        *args: Passed on to ``torch.utils.data.DataLoader``.
        **kwargs: Passed on to ``torch.utils.data.DataLoader``.

    Raises:
        ValueError: If the data set has no indices, or the order does not follow from the number of the epoch.

    Example:
        >>> loader = ResumableDataLoader(range(6), batch_size=2)
        >>> batches = iter(loader)
        >>> next(batches)
        tensor([0, 1])
        >>> restarted = ResumableDataLoader(range(6), batch_size=2)
        >>> restarted.load_state_dict(loader.state_dict())
        >>> list(restarted)
        [tensor([2, 3]), tensor([4, 5])]
        >>> len(list(restarted)), len(restarted)
        (3, 3)
    """

    def __init__(self, dataset: Dataset[T_co], *args: Any, **kwargs: Any) -> None:
        expect(
            not isinstance(dataset, IterableDataset),
            "dataset",
            "one with indices",
            type(dataset).__name__,
            "Give it `__getitem__` and `__len__`, or let the data set itself save its position.",
        )
        super().__init__(dataset, *args, **kwargs)
        self._sampler = _innermost_sampler(self)
        self._indices = _Remaining(super()._index_sampler)
        self._position = self._here(0)
        self._restored: dict[str, int] | None = None
        self._running = False

    def state_dict(self) -> dict[str, int]:
        """Save the number of the epoch, how many of its batches were delivered, and how many it has."""
        return dict(self._position)

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Let the next iterator continue where ``state_dict`` was taken, if it belongs to that epoch."""
        self._position = self._restored = dict(state_dict)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # torch names its private iterator
        restored, self._restored = self._restored, None
        return self._batches(restored)

    def _batches(self, restored: dict[str, int] | None) -> Iterator[Any]:
        # Being a generator, this begins at the first `next`. Lightning makes the iterator of a resumed epoch before
        # it calls `set_epoch`, and workers would otherwise prefetch in the order of another epoch.
        if self._running:  # somebody looks through the data in the middle of an epoch
            yield from super().__iter__()
            return
        self._running = True
        if restored is not None:
            _count_the_epoch()
        try:
            self._position = self._here(self._num_done(restored))
            self._indices.skip = self._position["num_batches"]
            for batch in super().__iter__():
                self._position["num_batches"] += 1
                yield batch
        finally:
            self._running = False

    def _here(self, num_batches: int) -> dict[str, int]:
        epoch = getattr(self._sampler, "epoch", 0)
        return {"epoch": epoch, "num_batches": num_batches, "num_batches_in_epoch": len(self)}

    def _num_done(self, restored: dict[str, int] | None) -> int:
        if restored is None or restored["epoch"] != self._here(0)["epoch"]:
            return 0
        if restored["num_batches_in_epoch"] != len(self):
            warn_at_user_line(
                f"The interrupted epoch had {restored['num_batches_in_epoch']} batches and now has {len(self)}, so "
                "some of its samples may be seen twice and others not at all. The next epoch is complete.",
            )
        return restored["num_batches"] if restored["num_batches"] < len(self) else 0

    @property
    def _index_sampler(self) -> _Remaining:
        # torch's iterators read their batches of indices from here.
        return self._indices


class _Remaining:
    """The batches of indices without the first ``skip`` ones, once."""

    def __init__(self, indices: Any) -> None:
        self.indices = indices
        self.skip = 0

    def __iter__(self) -> Iterator[Any]:
        # A generator too: torch's iterator over workers asks twice and uses the second answer.
        skip, self.skip = self.skip, 0
        yield from islice(iter(self.indices), skip, None)

    def __len__(self) -> int:
        return len(self.indices)


def _count_the_epoch() -> None:
    """Let Lightning count the epoch that begins, where it resumed from a checkpoint of the last batch of one.

    Lightning counts the epoch of the checkpoint as done then, but not the next as begun. A checkpoint in the middle of
    that one would look as if it had not begun, and resuming from it would repeat the epoch.
    """
    # A data loader is not told by which trainer it is used, hence the look at the callers.
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        loop = frame.f_locals.get("self")
        if isinstance(loop, FitLoop):
            progress: Any = loop.epoch_progress  # its annotation names a base class
            if progress.current.ready == progress.current.processed:
                progress.increment_ready()
                progress.increment_started()
            return
        frame = frame.f_back


def _innermost_sampler(loader: DataLoader[Any]) -> Iterable[Any]:
    sampler: Iterable[Any] = getattr(loader.batch_sampler, "sampler", loader.sampler)
    expect(
        hasattr(sampler, "set_epoch") or isinstance(sampler, SequentialSampler),
        "sampler",
        "one whose order follows from the number of the epoch",
        type(sampler).__name__,
        "Pass sampler=DistributedSampler(dataset, num_replicas=1, rank=0, seed=seed) instead of shuffle=True.",
    )
    return sampler
