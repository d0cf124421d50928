"""The number of samples that one optimizer step is made from."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import CombinedLoader

from lightning_sgd._validation import expect


def effective_batch_size(trainer: Trainer) -> int:
    """Count the samples behind one optimizer step: loader's batch size × accumulated batches × ranks.

    It can be asked from ``configure_optimizers`` on and in every hook of a callback. Before the loaders are set up it
    requests the training loader once more and drops it, instead of having Lightning set them up early: that would
    make a resumed run forget its position within the epoch.

    Args:
        trainer: A Trainer whose ``fit`` is running.

    Returns:
        The size of a complete batch; the last one of an epoch may be smaller.

    Raises:
        ValueError: If there is not exactly one training loader, or its batch size is not known.

    Example:
        In ``configure_optimizers``, with a critical batch size known beforehand::

            lr = base_lr * min(effective_batch_size(self.trainer), critical) / critical
    """
    sharding = trainer.distributed_sampler_kwargs or {"num_replicas": 1}
    batch_size = _batch_size(_only_train_loader(trainer))
    return batch_size * trainer.accumulate_grad_batches * int(sharding["num_replicas"])


def _only_train_loader(trainer: Trainer) -> object:
    loaders: Any = trainer.train_dataloader
    source = trainer.fit_loop._data_source
    if loaders is None and source.instance is not None and source.is_defined():
        loaders = source.dataloader()
    expect(
        loaders is not None,
        "trainer.train_dataloader",
        "known",
        loaders,
        "Ask while `fit` runs, from `configure_optimizers` on.",
    )
    combined = loaders if isinstance(loaders, CombinedLoader) else CombinedLoader(loaders)
    expect(
        len(combined.flattened) == 1,
        "train_dataloader",
        "a single loader",
        len(combined.flattened),
        "With several, compute the size that you mean yourself.",
    )
    return combined.flattened[0]


def _batch_size(loader: object) -> int:
    sampler = getattr(loader, "batch_sampler", None)
    batch_size = getattr(loader, "batch_size", None) or getattr(sampler, "batch_size", None)
    expect(
        isinstance(batch_size, int),
        "train_dataloader.batch_size",
        "an integer",
        batch_size,
        "Let a torch DataLoader make the batches, or give the loader this attribute.",
    )
    return int(batch_size or 0)
