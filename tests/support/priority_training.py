"""Logistic regression on three clusters with priority sampling, and what was drawn for every batch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import timedelta

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.strategies import DDPStrategy
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset

from lightning_sgd import PrioritySampling, priority_mean
from support.training import trainer

N, B, D, C = 50, 8, 5, 3
BATCHES = math.ceil(N / B)


@dataclass
class Sample:
    index: torch.Tensor
    x: torch.Tensor
    y: torch.Tensor


class Clusters(Dataset):
    """Three clusters in five dimensions, some samples far from theirs; sample i knows its number."""

    def __init__(self, batch_format="tuple", num=N):
        generator = torch.Generator().manual_seed(0)
        self.y = torch.arange(num) % C
        centres = torch.randn(C, D, generator=generator)
        self.x = centres[self.y] + 0.7 * torch.randn(num, D, generator=generator)
        self.batch_format = batch_format

    def __len__(self):
        return len(self.y)

    def __getitem__(self, i):
        item = torch.tensor(i), self.x[i], self.y[i]
        return (
            dict(zip(("index", "x", "y"), item, strict=True))
            if self.batch_format == "dict"
            else item
        )


def as_sample(items):
    return Sample(*map(torch.stack, zip(*items, strict=True)))


def parts(batch):
    if isinstance(batch, dict):
        return batch["index"], batch["x"], batch["y"]
    return (batch.index, batch.x, batch.y) if isinstance(batch, Sample) else batch


class Linear(LightningModule):
    """Logistic regression that writes down which samples it got."""

    def __init__(self, reduce="mean", lr=0.5, **settings):
        super().__init__()
        self.layer = torch.nn.Linear(D, C)
        with torch.no_grad():
            self.layer.weight.zero_()
            self.layer.bias.zero_()
        self.reduce, self.lr, self.settings = reduce, lr, settings
        self.seen, self.losses = [], []

    def training_step(self, batch, batch_idx):
        index, x, y = parts(batch)
        self.seen.append(index.tolist())
        loss = self.loss(self.layer(x), y)
        self.losses.append(None if loss is None else loss.item())
        return loss

    def loss(self, logits, y):
        if self.reduce == "priority_mean":
            return priority_mean(cross_entropy(logits, y, reduction="none"))
        if self.reduce == "own":
            losses = logits.logsumexp(1) - logits.gather(1, y[:, None])[:, 0]
            return priority_mean(losses, logits)
        return cross_entropy(logits, y, **self.settings)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class Draws(Callback):
    """Writes down what was drawn for every batch, after the callback under test."""

    def __init__(self):
        self.draws, self.tables = [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        callback = next(c for c in trainer.callbacks if isinstance(c, PrioritySampling))
        draw = callback.run._draw
        self.draws.append(draw)
        own = draw.part(draw.indices, callback.run.sampler.rank, callback.run.sampler.num_replicas)
        assert parts(batch)[0].tolist() == own.tolist()


def loader(batch_format="tuple", num=N, **settings):
    collate = as_sample if batch_format == "dataclass" else None
    defaults = {"batch_size": B, "shuffle": True, "collate_fn": collate}
    return DataLoader(Clusters(batch_format, num), **{**defaults, **settings})


def fit(
    tmp_path, callback, module=None, data=None, ckpt_path=None, callbacks=(), watch=True, **settings
):
    """Train; returns module, draws, and the Trainer."""
    module, draws = module or Linear(), Draws()
    defaults = {"max_epochs": 3, "callbacks": [callback, *([draws] if watch else []), *callbacks]}
    running = trainer(tmp_path, **{**defaults, **settings})
    running.fit(module, loader() if data is None else data, ckpt_path=ckpt_path)
    return module, draws.draws, running


def quiet(**settings):
    return PrioritySampling(**{"save_figure": False, **settings})


def gloo():
    return DDPStrategy(start_method="fork", timeout=timedelta(seconds=30))


class Keep(Callback):
    """Writes down what each rank did."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_end(self, trainer, pl_module):
        callback, draws = trainer.callbacks[0], trainer.callbacks[1].draws
        content = {
            "indices": [draw.indices for draw in draws],
            "p": [draw.probabilities for draw in draws],
            "state": callback.state_dict(),
            "weight": pl_module.layer.weight.detach().clone(),
        }
        torch.save(content, self.folder / f"{trainer.global_rank}.pt")


def ranks(tmp_path, num, strategy=None, settings=None, data=None, **more):
    folder = tmp_path / f"{num}"
    folder.mkdir()
    devices = {"devices": num, "strategy": strategy or gloo()} if num > 1 else {}
    callback = quiet(**(settings or {}))
    fit(
        tmp_path,
        callback,
        data=loader(num=48, batch_size=B // num) if data is None else data,
        callbacks=[Keep(folder)],
        **devices,
        **more,
    )
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(num)]
