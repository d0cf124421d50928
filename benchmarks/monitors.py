"""What monitors cost at their default cadence: their share of the training time, from one run each.

The time inside a monitor's hooks is summed up and divided by the time of the whole fit; the looks before the first and
after the last step are counted too.

    python benchmarks/monitors.py
"""

from __future__ import annotations

import argparse
import json
import logging
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader, TensorDataset

from lightning_sgd import (
    CriticalBatchSizeMonitor,
    DigitsClassifier,
    DigitsDataModule,
    GaussianityMonitor,
    GradientErrorMonitor,
    MaSS,
    RankMonitor,
    TailIndexMonitor,
)

HOOKS = (
    "on_fit_start",
    "on_train_start",
    "on_before_optimizer_step",
    "on_train_batch_end",
    "on_train_epoch_end",
    "on_train_end",
)
MONITORS: dict[str, Callable[[], Callback]] = {
    "RankMonitor": lambda: RankMonitor(save_figure=False),
    "RankMonitor, with bound": lambda: RankMonitor(save_figure=False, log_bound=True),
    "GradientErrorMonitor, bf16": GradientErrorMonitor,
    "GradientErrorMonitor, topk": lambda: GradientErrorMonitor("topk"),
    "GaussianityMonitor": lambda: GaussianityMonitor(save_figure=False),
    "TailIndexMonitor": lambda: TailIndexMonitor(save_figure=False),
    "CriticalBatchSizeMonitor": lambda: CriticalBatchSizeMonitor(save_figure=False),
}


class DemoCNN(DigitsClassifier):
    """The network of the demo."""

    def __init__(self) -> None:
        super().__init__(architecture="cnn", batch_norm=True)

    def configure_optimizers(self) -> MaSS:
        """As in the demo."""
        return MaSS(self.parameters(), lr=0.1)


class MLP10M(LightningModule):
    """Ten million parameters in matrices with up to 2048 rows."""

    def __init__(self) -> None:
        super().__init__()
        sizes = [512, 2048, 2048, 2048, 10]
        layers: list[torch.nn.Module] = []
        for num_in, num_out in pairwise(sizes):
            layers += [torch.nn.Linear(num_in, num_out), torch.nn.ReLU()]
        self.net = torch.nn.Sequential(*layers[:-1])

    def training_step(self, batch: list[torch.Tensor]) -> torch.Tensor:
        """Cross-entropy of random labels."""
        return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain SGD with decay."""
        return torch.optim.SGD(self.parameters(), lr=0.01, weight_decay=1e-4)


def random_batches(num_batches: int) -> DataLoader[Any]:
    """Batches of 128 for the MLP."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(128 * num_batches, 512, generator=generator)
    return DataLoader(TensorDataset(x, torch.arange(len(x)) % 10), batch_size=128)


@dataclass(frozen=True, slots=True)
class Result:
    """What one monitor cost in one run.

    Attributes:
        job: What was trained.
        monitor: Name of the monitor.
        seconds: Time of the fit.
        num_looks: How often it looked.
        num_full: How many of these were full looks.
        milliseconds_per_look: Mean time of a look.
        share: Part of the time of the fit that was spent in the monitor.
    """

    job: str
    monitor: str
    seconds: float
    num_looks: int
    num_full: int
    milliseconds_per_look: float
    share: float


def measure(job: str, name: str, module: LightningModule, epochs: int, data: Any) -> Result:
    """Train once with a monitor whose hooks are timed."""
    monitor = MONITORS[name]()
    spent = [0.0]
    for hook in HOOKS:
        setattr(monitor, hook, timed(getattr(monitor, hook), spent))
    looks = count_calls(monitor, "look")
    cheap_looks = count_calls(monitor, "cheap_look")
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[monitor],
    )
    start = time.perf_counter()
    trainer.fit(module, data)
    seconds = time.perf_counter() - start
    num, share = len(looks) + len(cheap_looks), spent[0] / seconds
    return Result(job, name, seconds, num, len(looks), 1e3 * spent[0] / num, share)


def count_calls(monitor: Callback, method: str) -> list[None]:
    """A list that grows by one at every call of a method."""
    calls: list[None] = []
    original = getattr(monitor, method)

    def call(*args: object, **kwargs: object) -> object:
        calls.append(None)
        return original(*args, **kwargs)

    setattr(monitor, method, call)
    return calls


def timed(function: Callable[..., None], spent: list[float]) -> Callable[..., None]:
    """The function, adding its time to ``spent``."""

    def call(*args: object, **kwargs: object) -> None:
        start = time.perf_counter()
        try:
            function(*args, **kwargs)
        finally:
            spent[0] += time.perf_counter() - start

    return call


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write the results here")
    parser.add_argument("--quick", action="store_true", help="a few steps only, to try the script")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    results = []
    for name in MONITORS:
        seed_everything(0, verbose=False)
        epochs, num_batches = (2, 2) if arguments.quick else (30, 100)
        # The first look of the MLP alone takes a hundredth of the first minutes.
        digits = DigitsDataModule(batch_size=16)
        results.append(measure("demo CNN", name, DemoCNN(), epochs, digits))
        loader = random_batches(num_batches)
        results.append(measure("MLP, 10 M", name, MLP10M(), epochs, loader))
    table = Table("job", "monitor", "s", "looks", "full", "ms/look", "share of time")
    for r in results:
        times = (
            f"{r.seconds:.1f}",
            str(r.num_looks),
            str(r.num_full),
            f"{r.milliseconds_per_look:.1f}",
        )
        table.add_row(r.job, r.monitor, *times, f"{r.share:.2%}")
    Console(width=100).print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(r) for r in results], indent=2) + "\n")


if __name__ == "__main__":
    main()
