"""The number of samples behind an optimizer step, read from running Trainers."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.utilities import CombinedLoader
from support.training import trainer
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    SequentialSampler,
    TensorDataset,
)

from lightning_sgd.data.digits import DigitsDataModule
from lightning_sgd.data.effective_batch import effective_batch_size

DATASET = TensorDataset(torch.zeros(48, 32))


class Asks(BoringModel):
    """Asks in `configure_optimizers` and after every batch; on the second rank too, by way of an assertion."""

    def __init__(self, expected=None):
        super().__init__()
        self.answers, self.expected = [], expected

    def ask(self):
        answer = effective_batch_size(self.trainer)
        assert self.expected in (None, answer)
        self.answers.append(answer)

    def training_step(self, batch, batch_idx):
        return self.step(batch[0].flatten(1)[:, :32])

    def validation_step(self, batch, batch_idx):
        pass

    def on_train_batch_end(self, *_):
        self.ask()

    def configure_optimizers(self):
        self.ask()
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Stream(IterableDataset):
    def __iter__(self):
        yield from DATASET


def fit(tmp_path, model, loaders, **settings):
    settings = {"max_epochs": 1, "limit_val_batches": 0, **settings}
    trainer(tmp_path, **settings).fit(model, loaders, DataLoader(DATASET))
    return set(model.answers)


@pytest.mark.parametrize(
    "loaders",
    [
        DataLoader(DATASET, batch_size=8),
        DataLoader(
            DATASET, batch_sampler=BatchSampler(SequentialSampler(DATASET), 8, drop_last=False)
        ),
        DataLoader(Stream(), batch_size=8),
        CombinedLoader(DataLoader(DATASET, batch_size=8)),
    ],
    ids=["plain", "batch sampler", "stream", "combined"],
)
@pytest.mark.parametrize("accumulate", [1, 3])
def test_one_rank(tmp_path, loaders, accumulate):
    model = Asks()
    answers = fit(tmp_path, model, loaders, accumulate_grad_batches=accumulate)
    assert answers == {8 * accumulate}
    assert len(model.answers) == 7, "once before and after each of 6 batches"


@pytest.mark.parametrize("accumulate", [1, 3])
def test_two_ranks(tmp_path, two_ranks, accumulate):
    # The learning rate that follows from it must be the same everywhere.
    settings = {"accumulate_grad_batches": accumulate, **two_ranks()}
    fit(tmp_path, Asks(expected=2 * 8 * accumulate), DataLoader(DATASET, batch_size=8), **settings)
    wrong = Asks(expected=8)
    with pytest.raises(Exception, match="AssertionError"):
        fit(tmp_path, wrong, DataLoader(DATASET, batch_size=8), **two_ranks())


def test_the_loader_of_a_module_or_a_data_module(tmp_path):
    class WithLoader(Asks):
        def train_dataloader(self):
            return DataLoader(DATASET, batch_size=12)

    model = WithLoader()
    trainer(tmp_path, limit_val_batches=0).fit(model)
    assert set(model.answers) == {12}
    model = Asks()
    trainer(tmp_path, max_epochs=1, limit_val_batches=0).fit(model, datamodule=DigitsDataModule(50))
    assert set(model.answers) == {50}


def test_accumulation_that_changes(tmp_path):
    model = Asks()
    schedule = GradientAccumulationScheduler({0: 1, 1: 2})
    fit(tmp_path, model, DataLoader(DATASET, batch_size=8), callbacks=[schedule], max_epochs=2)
    assert model.answers == [8] * 7 + [16] * 6


def test_in_a_callback(tmp_path):
    answers = []

    class Asking(Callback):
        def on_train_start(self, trainer, pl_module):
            answers.append(effective_batch_size(trainer))

    fit(tmp_path, Asks(), DataLoader(DATASET, batch_size=8), callbacks=[Asking()])
    assert answers == [8]


def test_asking_early_does_not_set_the_loaders_up(tmp_path):
    # Otherwise a resumed run would forget its position within the epoch.
    class Checks(Asks):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            assert self.trainer.train_dataloader is None
            return optimizer

    assert fit(tmp_path, Checks(), DataLoader(DATASET, batch_size=8)) == {8}


@pytest.mark.parametrize(
    ("loaders", "message"),
    [
        (
            [DataLoader(DATASET), DataLoader(DATASET)],
            "Expected `train_dataloader` to be a single loader, got 2. With several",
        ),
        (
            DataLoader(Stream(), batch_size=None),
            "Expected `train_dataloader.batch_size` to be an integer, got None. Let",
        ),
        ([[0], [1]], "a single loader, got 2"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, loaders, message):
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, Asks(), loaders)


def test_a_trainer_that_does_not_fit_is_named():
    quiet = {"logger": False, "enable_checkpointing": False, "accelerator": "cpu"}
    with pytest.raises(
        ValueError, match=r"Expected `trainer\.train_dataloader` to be known, got None"
    ):
        effective_batch_size(Trainer(**quiet))
