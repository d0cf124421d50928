"""A small training with the callbacks under test, watched at every hook."""

from __future__ import annotations

import multiprocessing
import random
import time
from datetime import timedelta
from unittest import mock

import torch
import torch.distributed as dist
from lightning.pytorch import seed_everything
from lightning.pytorch.strategies import DDPStrategy

from lightning_sgd import DigitsClassifier, DigitsDataModule
from support.training import trainer
from support.watching import Journal, Lines, Record, Watcher

NUM_BATCHES, NUM_EPOCHS = 7, 2
DROPOUT_AT = 4  # after the first hidden layer, its normalisation and its ReLU


class Classifier(DigitsClassifier):
    """Has buffers, and dropout that draws from the global generator.

    Args:
        dropout: Probability; 0.0 where a resumed run is to be exact.
        compiled: Whether sub-modules are compiled.
        failing_step: Optimizer step in which ``training_step`` raises.
        failing_rank: The rank on which it does.
    """

    def __init__(self, dropout=0.1, compiled=False, failing_step=None, failing_rank=0):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            super().__init__(hidden_sizes=[16], batch_norm=True)
        self.net.insert(DROPOUT_AT, torch.nn.Dropout(dropout))
        self.failing_step, self.failing_rank = failing_step, failing_rank
        if compiled:
            self.net[1] = torch.compile(self.net[1], backend="eager")

    def training_step(self, batch, batch_idx):
        if (self.global_step, self.global_rank) == (self.failing_step, self.failing_rank):
            raise RuntimeError("the training step failed")
        return super().training_step(batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class ManualClassifier(Classifier):
    """Manual optimization: the first layers every batch, the last layer every other batch."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        first, last = self.optimizers()
        loss = super().training_step(batch, batch_idx)
        self.manual_backward(loss)
        for optimizer in [first, last] if batch_idx % 2 else [first]:
            optimizer.step()
            optimizer.zero_grad()
        return loss

    def configure_optimizers(self):
        parts = self.net[:-1], self.net[-1]
        return tuple(torch.optim.SGD(part.parameters(), lr=0.1, momentum=0.9) for part in parts)


def digits(world_size=1):
    """Seven batches an epoch on every rank, the last one shorter."""
    return DigitsDataModule(batch_size=64 // world_size, num_val=897, num_test=500)


def stopped_clock():
    """Nothing takes time, so that what is planned by the clock can be repeated."""
    return 0.0


class UnevenClock:
    """Every rank has its own idea of how long things take."""

    def __init__(self):
        self.now, self.random = 0.0, {}

    def __call__(self):
        rank = dist.get_rank() if dist.is_initialized() else -1
        self.now += self.random.setdefault(rank, random.Random(rank)).expovariate(1.0)
        return self.now


class Training:
    """One run of the Trainer with the callbacks under test, and the record of it.

    Args:
        folder: Where files go.
        *callbacks: The callbacks under test.
        module: What is trained.
        ranks: Number of processes.
        timeout: Seconds after which a rank gives up waiting for the others.
        clock: What ``time.perf_counter`` returns meanwhile.
        others: Further callbacks, which are not under test.
        **settings: For the Trainer.
    """

    def __init__(
        self,
        folder,
        *callbacks,
        module=None,
        ranks=1,
        timeout=30,
        clock=stopped_clock,
        others=(),
        **settings,
    ):
        self.module = Classifier() if module is None else module
        self.record, self.ranks, self.clock = Record(), ranks, clock
        self.records = [self.record]  # one per rank
        self.file = folder / "record"
        self.before = Record()
        watchers = Watcher(self.before), Watcher(self.record, self.file)
        journal = Journal(self.record)
        if ranks > 1:
            settings |= {"devices": ranks, "strategy": gloo(timeout)}
        defaults = {
            "max_epochs": NUM_EPOCHS,
            "limit_val_batches": 1,
            "limit_test_batches": 2,
            "limit_predict_batches": 2,
            "num_sanity_val_steps": 0,
            "logger": journal,
            "log_every_n_steps": 1,
            "callbacks": [watchers[0], *callbacks, watchers[1], *others],
        }
        self.trainer = journal.trainer = trainer(folder, **{**defaults, **settings})

    def run(self, entry="fit", **kwargs):
        """Train, or what ``entry`` says, from the same random state every time; returns itself."""
        seed_everything(0, verbose=False)
        data = kwargs.pop("data", None) or digits(self.ranks)
        with Lines(self.record), mock.patch.object(time, "perf_counter", self.clock):
            try:
                getattr(self.trainer, entry)(self.module, datamodule=data, **kwargs)
            finally:
                end_children()
        if self.ranks > 1:
            files = (f"{self.file}.{rank}" for rank in range(self.ranks))
            self.records = [torch.load(file, weights_only=False) for file in files]
        return self


def gloo(timeout):
    """Real processes on the CPU that give up instead of hanging.

    DDP rearranges its buckets after the first step of every start, which changes the order in which three and more
    ranks are added up; it leaves them alone when it has to look for unused parameters.
    """
    wait = timedelta(seconds=timeout)
    return DDPStrategy(start_method="fork", timeout=wait, find_unused_parameters=True)


def end_children():
    """Ranks that still wait for one another would keep the interpreter from ending."""
    for child in multiprocessing.active_children():
        child.kill()
