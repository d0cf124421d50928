"""A small regression that is trained by the Trainer and, as its oracle, by a loop written out by hand."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader, TensorDataset

NUM_BATCHES = 7


def network():
    """The same weights every time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))


def batches():
    """The same batches, in the same order, every time."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(NUM_BATCHES * 8, 4, generator=generator)
    y = x.sum(dim=1, keepdim=True).sin()
    return DataLoader(TensorDataset(x, y), batch_size=8)


def loss_of(net, batch):
    x, y = batch
    return torch.nn.functional.mse_loss(net(x), y)


class Regression(LightningModule):
    """Trains ``net`` with what ``make`` builds from its parameters."""

    def __init__(self, make, schedule=None):
        super().__init__()
        self.net, self.make, self.schedule = network(), make, schedule

    def training_step(self, batch, batch_idx):
        return loss_of(self.net, batch)

    def configure_optimizers(self):
        optimizer = self.make(self.parameters())
        return optimizer if self.schedule is None else ([optimizer], [self.schedule(optimizer)])


class TwoOptimizers(LightningModule):
    """Manual optimization: the first layer every batch, the last layer every other batch."""

    def __init__(self, make):
        super().__init__()
        self.automatic_optimization = False
        self.net, self.make = network(), make

    def training_step(self, batch, batch_idx):
        first, last = self.optimizers()
        self.manual_backward(loss_of(self.net, batch))
        first.step()
        first.zero_grad()
        if batch_idx % 2:
            last.step()
            last.zero_grad()

    def configure_optimizers(self):
        return self.make(self.net[0].parameters()), self.make(self.net[2].parameters())


def trainer(tmp_path, **settings):
    """A quiet Trainer on the CPU for two epochs."""
    quiet = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 2,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": tmp_path,
    }
    return Trainer(**{**quiet, **settings})


def by_hand(make, *, epochs=2, accumulate=1, clip=None, autocast=nullcontext, scaler=None):
    """What the Trainer should do, in plain PyTorch; returns the weights."""
    net = network()
    optimizer = make(net.parameters())
    for _ in range(epochs):
        for index, batch in enumerate(batches(), start=1):
            with autocast():
                loss = loss_of(net, batch) / accumulate
            (loss if scaler is None else scaler.scale(loss)).backward()
            if index % accumulate and index != NUM_BATCHES:
                continue
            if scaler is not None:
                scaler.unscale_(optimizer)
            if clip is not None:
                clip(net.parameters())
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
                scaler.update()
            optimizer.zero_grad()
    return list(net.parameters())
