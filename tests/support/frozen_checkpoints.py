"""One small training per plug-in, interrupted in the middle of an epoch, whose checkpoints are kept as files.

``tests/checkpoints/<plug-in>/middle.ckpt`` was written after five of fourteen steps by the version that introduced the
plug-in, ``end.ckpt`` by the same training at its end. Later versions must resume the first and arrive at the second.
"""

from __future__ import annotations

import time
from functools import partial
from unittest import mock

import torch
from lightning.pytorch import Callback, LightningDataModule, seed_everything

import lightning_sgd
from lightning_sgd import ResumableDataLoader
from support.callback_training import end_children, stopped_clock
from support.strategy_training import FORK, samples, sgd
from support.training import Regression, trainer

STEPS, INTERRUPTED_AT = 14, 5
COMPARED = ("state_dict", "optimizer_states", "lr_schedulers", "callbacks")
NEEDS_STRATEGY = {
    "CommunicationMonitor": "LocalSGDStrategy",
    "ByzantineMonitor": "ByzantineStrategy",
}


class Samples(LightningDataModule):
    """Seven batches an epoch for all ranks together, whose position is in the checkpoint.

    Args:
        num_ranks: Number of processes.
    """

    def __init__(self, num_ranks):
        super().__init__()
        self.batch_size = 8 // num_ranks

    def train_dataloader(self):
        return ResumableDataLoader(samples(), self.batch_size)


class Scheduled(Regression):
    """Steps its scheduler after every optimizer step."""

    def configure_optimizers(self):
        optimizer = self.make(self.parameters())
        return [optimizer], [{"scheduler": self.schedule(optimizer), "interval": "step"}]


class Save(Callback):
    """Writes the two checkpoints, on all ranks as the Trainer wants it.

    Args:
        folder: Where they go.
    """

    def __init__(self, folder):
        self.folder = folder

    def on_train_batch_end(self, trainer, *_):
        names = {INTERRUPTED_AT: "middle.ckpt", STEPS: "end.ckpt"}
        if trainer.global_step in names:
            trainer.save_checkpoint(self.folder / names[trainer.global_step])


def train(plugin, settings, folder, resume=None):
    """Train with the plug-in for fourteen steps, or for what is left of them, and write checkpoints to ``folder``.

    Args:
        plugin: Its record in the catalogue.
        settings: With which it is built, by name of the plug-in.
        folder: Where the checkpoints go.
        resume: The checkpoint to go on from.
    """

    def build(name, **more):
        arguments = settings.get(name, {})
        return partial(getattr(lightning_sgd, name), **{**arguments, **more})

    module, callbacks, strategy, num_ranks = Regression(sgd), [], "auto", 1
    strategy_name = NEEDS_STRATEGY.get(plugin.name, plugin.name)
    if plugin.kind == "optimizer":
        module = Regression(build(plugin.name))
    elif plugin.kind == "lr_scheduler":
        module = Scheduled(partial(torch.optim.SGD, lr=0.1), build(plugin.name))
    elif plugin.kind == "callback":
        callbacks = [build(plugin.name)()]
    if plugin.kind == "strategy" or plugin.name in NEEDS_STRATEGY:
        strategy, num_ranks = build(strategy_name, **FORK)(), 2
    seed_everything(0, verbose=False)
    with mock.patch.object(time, "perf_counter", stopped_clock):
        try:
            trainer(
                folder,
                devices=num_ranks,
                strategy=strategy,
                callbacks=[*callbacks, Save(folder)],
                max_epochs=-1,
                max_steps=STEPS,
            ).fit(module, datamodule=Samples(num_ranks), ckpt_path=resume)
        finally:
            end_children()


def content(file):
    """What a checkpoint holds, without what names a version or an hour."""
    saved = torch.load(file, weights_only=True)
    own = [key for key in saved if key.startswith("lightning_sgd")]
    return {key: saved[key] for key in (*COMPARED, *own) if key in saved}


def plain_sgd():
    """Weights after plain SGD on the same data: equal bits mean that this machine adds up as the one that wrote."""
    seed_everything(0, verbose=False)
    module = Regression(sgd)
    optimizer = sgd(module.parameters())
    for batch in torch.utils.data.DataLoader(samples(), 8):
        optimizer.zero_grad()
        module.training_step(batch, 0).backward()
        optimizer.step()
    return torch.cat([param.detach().reshape(-1) for param in module.parameters()])
