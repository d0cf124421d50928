"""Classes small enough to know by hand what training makes of them."""

from __future__ import annotations

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, TensorDataset

from lightning_sgd._validation import expect

BATCHES_PER_EPOCH = 3


class Backbone(torch.nn.Module):
    """Base class of an argument.

    Args:
        depth: A number.
    """

    def __init__(self, depth: int = 1) -> None:
        super().__init__()
        expect(depth > 0, "depth", "positive", depth, "Try 1.")
        self.depth = depth


class DeepBackbone(Backbone):
    """A subclass to be named."""


class Descent(LightningModule):
    """Loss w, so that plain SGD with lr 1 lowers w by exactly 1 in every step.

    Args:
        target: The value of w at which the validation loss is lowest.
        backbone: A nested object.
        failing_step: Step at which training fails, if any.
    """

    def __init__(
        self,
        target: float = 0.0,
        backbone: Backbone | None = None,
        failing_step: int | None = None,
    ) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(()))
        self.target, self.backbone, self.failing_step = target, backbone, failing_step

    def training_step(self, batch, batch_idx):
        expect(self.global_step != self.failing_step, "step", "another", self.global_step, "Stop.")
        self.log("train/loss", self.w)
        return self.w

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", (self.w - self.target).abs())

    def test_step(self, batch, batch_idx):
        self.log("test/w", self.w)

    def predict_step(self, batch, batch_idx):
        return self.w


class Untested(LightningModule):
    """Has no ``test_step``."""

    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch, batch_idx):
        raise AssertionError("training must not start")


class Numbers(LightningDataModule):
    """Three batches of nothing in particular."""

    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.zeros(BATCHES_PER_EPOCH)))

    def val_dataloader(self):
        return DataLoader(TensorDataset(torch.zeros(1)))

    test_dataloader = predict_dataloader = val_dataloader


class TrainingOnly(LightningDataModule):
    """Has no data to test on."""

    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.zeros(BATCHES_PER_EPOCH)))


class NoLoader(LightningDataModule):
    """Its files are missing."""

    def train_dataloader(self):
        raise FileNotFoundError("no images here")


class PerStepLR(StepLR):
    """A scheduler that says how often it wants to be called."""

    interval = "step"


class Witness(Callback):
    """Keeps the learning rate that training ended with.

    Args:
        patience: A number.
    """

    lr: float | None = None

    def __init__(self, patience: int = 0) -> None:
        expect(patience >= 0, "patience", "at least 0", patience, "Try 0.")

    def on_train_end(self, trainer, pl_module):
        type(self).lr = trainer.optimizers[0].param_groups[0]["lr"]
