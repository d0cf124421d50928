"""The training of every strategy: a megabyte of parameters, with computation simulated by sleep."""

from __future__ import annotations

import random
import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import Strategy
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.utils.data import DataLoader, TensorDataset

from lightning_sgd.callbacks.communication_monitor.traffic_source import TrafficSource, find_source
from lightning_sgd.functional.distributed.traffic import Traffic

from .counters import read
from .network import INTERFACE

COMPUTE, SLOWER, SLOW_STEPS = 0.05, 4, 0.25
WIDTH, BATCH_SIZE = 480, 8
SNAPSHOT_EVERY = 4  # steps


class Net(LightningModule):
    """Sleeps for as long as the simulated computation takes, then does a small real step.

    Args:
        straggles: Whether one step in four takes four times as long, on every rank at times of its own.
    """

    def __init__(self, straggles: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Sequential(
            *(torch.nn.Linear(64, WIDTH), torch.nn.ReLU()),
            *(torch.nn.Linear(WIDTH, WIDTH), torch.nn.ReLU(), torch.nn.Linear(WIDTH, 10)),
        )
        self.straggles, self.slept = straggles, 0.0
        self.draws = random.Random(0)

    def on_train_start(self) -> None:
        """Draw the slow steps of this rank, the same ones with every strategy."""
        self.draws = random.Random(self.global_rank)

    def training_step(self, batch: list[torch.Tensor]) -> torch.Tensor:
        """Return the cross-entropy."""
        is_slow = self.draws.random() < SLOW_STEPS and self.straggles
        seconds = COMPUTE * (SLOWER if is_slow else 1)
        begin = time.perf_counter()
        time.sleep(seconds)
        self.slept += time.perf_counter() - begin
        return cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return SGD with momentum."""
        return torch.optim.SGD(self.parameters(), lr=0.02, momentum=0.9)


class Meter(Callback):
    """Measures from the end of the warm-up to the end of training, on this rank, and keeps copies of the weights.

    Args:
        warm_up: Number of steps that do not count.
    """

    def __init__(self, warm_up: int) -> None:
        self.warm_up = warm_up
        self.result: dict[str, float] = {}
        self.snapshots: dict[int, tuple[float, torch.Tensor]] = {}
        self.source: TrafficSource | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the source of the counts."""
        self.source = find_source(trainer)
        self.start = time.perf_counter()

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Pass the backward pass on to the source of the counts."""
        assert self.source is not None
        self.source.after_backward()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Start the clock after the warm-up, and copy the weights, in a tenth of a millisecond."""
        if trainer.global_step == self.warm_up:
            self.begin = self._now(pl_module)
        if trainer.global_step % SNAPSHOT_EVERY == 0:
            weights = parameters_to_vector(pl_module.parameters()).detach()
            self.snapshots[trainer.global_step] = (time.perf_counter() - self.start, weights)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock, before the strategy averages the models for the last time."""
        seconds, slept, traffic, sent = self._now(pl_module)
        steps = trainer.global_step - self.warm_up
        counted, on_wire = traffic - self.begin[2], sent - self.begin[3]
        self.result = {
            "ms": 1e3 * (seconds - self.begin[0]) / steps,
            "compute_ms": 1e3 * (slept - self.begin[1]) / steps,
            "counted_blocked_ms": 1e3 * counted.seconds / steps,
            "counted_mb": counted.num_bytes / 1e6 / steps,
            "counted_messages": counted.num_messages / steps,
            "interface_mb": on_wire.payload / 1e6 / steps,
        }

    def _now(self, net: LightningModule) -> tuple[float, float, Traffic, Any]:
        assert self.source is not None
        assert isinstance(net, Net)
        return time.perf_counter(), net.slept, self.source.read(), read(INTERFACE)


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """Return all images, scaled to [0, 1], and labels."""
    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)


def loss_of(weights: torch.Tensor) -> float:
    """Return the cross-entropy on all digits of the network with these weights."""
    net = Net(False)
    vector_to_parameters(weights, net.parameters())
    images, labels = digits()
    with torch.no_grad():
        return float(cross_entropy(net.net(images), labels))


def train(
    strategy: Strategy, straggles: bool, num_hosts: int, num_steps: int, warm_up: int
) -> Meter:
    """Train once on this rank, and return the measurements."""
    net, meter = Net(straggles), Meter(warm_up)
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        num_nodes=num_hosts,
        strategy=strategy,
        max_steps=num_steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[meter],
    )
    trainer.fit(net, DataLoader(TensorDataset(*digits()), BATCH_SIZE, drop_last=True))
    return meter
