"""A user's script: trains on several ranks, saves as it goes, goes on after a restart, tests at the end."""

from __future__ import annotations

import argparse
import os
import signal
from datetime import timedelta
from pathlib import Path

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

import lightning_sgd
from lightning_sgd import DigitsClassifier, DigitsDataModule


class Killed(Callback):
    """One rank is killed at one step, the first time that the script runs."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Trainer, *_: object) -> None:
        first = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
        if first and (trainer.global_rank, trainer.global_step) == (1, self.step):
            os.kill(os.getpid(), signal.SIGKILL)


class Model(DigitsClassifier):
    """Says what it is trained with, as scripts do."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def main() -> None:
    """Train for two epochs, or what is left of them, then once more, then test."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--strategy", default="LocalSGDStrategy")
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--kill-at-step", type=int, default=-1)
    parser.add_argument("--epochs", type=int, nargs="+", default=[2])
    args = parser.parse_args()

    seed_everything(0, verbose=False)
    strategy = getattr(lightning_sgd, args.strategy)(timeout=timedelta(seconds=60))
    checkpoints = ModelCheckpoint(
        args.folder, "last", every_n_train_steps=5, enable_version_counter=False
    )
    trainer = Trainer(
        accelerator="cpu",
        devices=args.devices,
        num_nodes=args.nodes,
        strategy=strategy,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[checkpoints, Killed(args.kill_at_step)],
    )
    last = args.folder / "last.ckpt"
    model, data = Model(), DigitsDataModule(batch_size=32)
    for epochs in args.epochs:
        trainer.fit_loop.max_epochs = epochs
        trainer.fit(model, datamodule=data, ckpt_path=last if last.exists() else None)
    torch.save(model.state_dict(), args.folder / f"weights.{trainer.global_rank}")
    accuracy = trainer.test(model, datamodule=data, verbose=False)[0]["test/accuracy"]
    print(f"rank {trainer.global_rank} of {trainer.world_size}: accuracy {accuracy:.3f}")  # noqa: T201


if __name__ == "__main__":
    main()
