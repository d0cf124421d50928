"""Handwritten digits: real data that needs no download."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from lightning_sgd._validation import expect, expect_one_of, warn_no_effect
from lightning_sgd.data.resumable import ResumableDataLoader
from lightning_sgd.functional.partition import partition_by_label

Batch: TypeAlias = tuple[Tensor, Tensor] | dict[str, Tensor]
NUM_SAMPLES = 1797
NUM_CLASSES = 10

BatchFormat: TypeAlias = Literal["tuple", "dict"]


class DigitsDataModule(LightningDataModule):
    """The 1797 handwritten digits of scikit-learn, 8×8 pixels in [0, 1], ten classes.

    A batch is ``(images, labels)`` or ``{"image": images, "label": labels}`` with images of shape (n, 1, 8, 8),
    float32, and labels of shape (n,), int64. What neither validation nor test takes is for training: 1000 samples by
    default. The split depends on ``seed`` alone, the order of an epoch on ``seed`` and the number of the epoch, and
    neither touches the global random state. A resumed run continues with the very next batch.

    Every rank has the same number of batches. Without ``partition_skew`` the training data are dealt out anew in
    every epoch; with it each rank keeps its own part, as in federated learning. Prediction runs on the test images.

    Args:
        batch_size: Samples per batch and rank.
        num_val: Samples for validation.
        num_test: Samples for test.
        seed: Decides on split, label noise, partition and order.
        label_noise: Fraction of the training labels that a wrong label, drawn evenly, replaces.
        partition_skew: Let each rank own a fixed part: 0.0 for parts that look alike, 1.0 for parts sorted by label, in
            between for that fraction of a part. By default every rank sees all data in the course of time.
        batch_format: Whether a batch is a tuple or a dictionary.
        num_workers: Processes that load the data; 0 is fastest here.

    Raises:
        ValueError: If an argument is out of range.
        ImportError: If scikit-learn is missing.

    Example:
        >>> data = DigitsDataModule(batch_size=32)
        >>> data.setup("fit")
        >>> images, labels = next(iter(data.train_dataloader()))
        >>> images.shape, labels.dtype
        (torch.Size([32, 1, 8, 8]), torch.int64)
        >>> len(data.train_set), len(data.val_set), len(data.test_set)
        (1000, 297, 500)
    """

    def __init__(
        self,
        batch_size: int = 64,
        num_val: int = 297,
        num_test: int = 500,
        seed: int = 0,
        label_noise: float = 0.0,
        partition_skew: float | None = None,
        batch_format: BatchFormat = "tuple",
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.batch_size = batch_size
        self.num_val = num_val
        self.num_test = num_test
        self.seed = seed
        self.label_noise = label_noise
        self.partition_skew = partition_skew
        self.batch_format = batch_format
        self.num_workers = num_workers
        self._validate()
        self._position: dict[str, int] | None = None

    def setup(self, stage: str) -> None:
        """Load and split the data."""
        generator = torch.Generator().manual_seed(self.seed)
        images, labels = _load_digits()
        order = torch.randperm(NUM_SAMPLES, generator=generator)
        num_train = NUM_SAMPLES - self.num_val - self.num_test
        train, val, test = order.tensor_split([num_train, num_train + self.num_val])
        noisy = _with_noise(labels[train], self.label_noise, generator)
        self.train_set = DigitsDataset(images[train], noisy, self.batch_format)
        self.val_set = DigitsDataset(images[val], labels[val], self.batch_format)
        self.test_set = DigitsDataset(images[test], labels[test], self.batch_format)
        if stage == "fit":
            self._position = None

    def train_dataloader(self) -> ResumableDataLoader[Batch]:
        """Deliver batches in an order that depends on the number of the epoch."""
        dataset, (num_ranks, rank) = self.train_set, self._ranks()
        if self.partition_skew is not None:
            dataset, num_ranks, rank = self._own_part(num_ranks, rank), 1, 0
        # Lightning leaves a DistributedSampler alone and tells it the number of the epoch.
        sampler: DistributedSampler[int] = DistributedSampler(
            dataset, num_replicas=num_ranks, rank=rank, seed=self.seed
        )
        loader = ResumableDataLoader(dataset, sampler=sampler, **self._loader_settings())
        if self._position is not None and self._running_loader() is None:
            loader.load_state_dict(self._position)
        return loader

    def val_dataloader(self) -> DataLoader[Batch]:
        """Deliver the validation set, in order; with several ranks Lightning distributes it."""
        return DataLoader(self.val_set, **self._loader_settings())

    def test_dataloader(self) -> DataLoader[Batch]:
        """Deliver the test set, in order; with several ranks Lightning distributes it."""
        return DataLoader(self.test_set, **self._loader_settings())

    def predict_dataloader(self) -> DataLoader[Batch]:
        """Deliver the test set, in order."""
        return self.test_dataloader()

    def state_dict(self) -> dict[str, Any]:
        """Save the position within the epoch, which Lightning forgets when it sets the loaders up early."""
        loader = self._running_loader()
        return loader.state_dict() if isinstance(loader, ResumableDataLoader) else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the position for the next training loader."""
        self._position = state_dict or None

    def _running_loader(self) -> object:
        return self.trainer.train_dataloader if self.trainer is not None else None

    def _ranks(self) -> tuple[int, int]:
        sharding = self.trainer.distributed_sampler_kwargs if self.trainer is not None else None
        return (sharding["num_replicas"], sharding["rank"]) if sharding else (1, 0)

    def _own_part(self, num_ranks: int, rank: int) -> DigitsDataset:
        assert self.partition_skew is not None
        if num_ranks == 1:
            warn_no_effect("`partition_skew` has no effect on one rank, which owns all data.")
        generator = torch.Generator().manual_seed(self.seed)
        labels = self.train_set.labels
        own = partition_by_label(labels, num_ranks, self.partition_skew, generator)[rank]
        return DigitsDataset(self.train_set.images[own], labels[own], self.batch_format)

    def _loader_settings(self) -> dict[str, Any]:
        return {
            "batch_size": self.batch_size,
            "num_workers": self.num_workers,
            "collate_fn": _as_it_is,
            # An own generator, because every iterator draws a seed for its workers.
            "generator": torch.Generator(),
        }

    def _validate(self) -> None:
        for argument in ("batch_size", "num_val", "num_test"):
            value = getattr(self, argument)
            expect(value >= 1, argument, "at least 1", value, "Give a positive number of samples.")
        expect(
            self.num_val + self.num_test < NUM_SAMPLES,
            "num_val + num_test",
            f"less than the {NUM_SAMPLES} samples that there are",
            self.num_val + self.num_test,
            "Leave some for training.",
        )
        expect(self.num_workers >= 0, "num_workers", "at least 0", self.num_workers, "Try 0.")
        fractions = {"label_noise": self.label_noise, "partition_skew": self.partition_skew}
        for argument, fraction in fractions.items():
            expect(
                fraction is None or 0.0 <= fraction <= 1.0,
                argument,
                "in [0, 1]",
                fraction,
                "It is a fraction of the training samples.",
            )
        expect_one_of(self.batch_format, BatchFormat, "batch_format")


class DigitsDataset(Dataset[Batch]):
    """Images and labels; a list of indices gives a whole batch, several times faster than stacking samples.

    Args:
        images: Images of shape (n, 1, 8, 8).
        labels: Labels of shape (n,).
        batch_format: Whether a batch is a tuple or a dictionary.
    """

    def __init__(self, images: Tensor, labels: Tensor, batch_format: str = "tuple") -> None:
        self.images = images
        self.labels = labels
        self.batch_format = batch_format

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int | list[int]) -> Batch:
        image, label = self.images[index], self.labels[index]
        return (image, label) if self.batch_format == "tuple" else {"image": image, "label": label}

    __getitems__ = __getitem__  # torch's name for the way to a whole batch


def _as_it_is(batch: Batch) -> Batch:
    return batch


def _load_digits() -> tuple[Tensor, Tensor]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "DigitsDataModule needs scikit-learn: pip install 'lightning-sgd[examples]'."
        ) from error
    digits = load_digits()
    images = torch.as_tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    return images, torch.as_tensor(digits.target, dtype=torch.int64)


def _with_noise(labels: Tensor, fraction: float, generator: torch.Generator) -> Tensor:
    wrong = torch.randperm(len(labels), generator=generator)[: round(fraction * len(labels))]
    shift = torch.randint(1, NUM_CLASSES, (len(wrong),), generator=generator)
    noisy = labels.clone()
    noisy[wrong] = (labels[wrong] + shift) % NUM_CLASSES
    return noisy
