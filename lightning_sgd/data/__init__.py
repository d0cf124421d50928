"""LightningDataModules and loaders, one per file."""

from lightning_sgd.data.digits import DigitsDataModule
from lightning_sgd.data.effective_batch import effective_batch_size
from lightning_sgd.data.resumable import ResumableDataLoader

__all__ = ["DigitsDataModule", "ResumableDataLoader", "effective_batch_size"]
