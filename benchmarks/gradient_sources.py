"""What the gradients of a noise statistic cost: passes of their own, or those of training, caught.

CPU time of an optimizer step of four accumulated batches, one thread, with a look after every step, over the same
without a monitor; the smallest of several rounds each, in turns. Four gradients a look in all cases.

    python benchmarks/gradient_sources.py
"""

from __future__ import annotations

import argparse
import json
import logging
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader, TensorDataset

from lightning_sgd import CriticalBatchSizeMonitor

ACCUMULATE, WIDTH = 4, 65536
CASES: dict[str, dict[str, Any] | None] = {
    "no monitor": None,
    "micro-batches, sketch": {"source": "microbatches", "num_coordinates": WIDTH},
    "micro-batches, whole": {"source": "microbatches", "num_coordinates": None},
    "passes of its own, sketch": {"source": "extra", "num_coordinates": WIDTH},
}


class MLP(LightningModule):
    """Two matrices of 1024 rows and what is around them: 2.2 million parameters."""

    def __init__(self) -> None:
        super().__init__()
        parts = [torch.nn.Linear(64, 1024), torch.nn.ReLU(), torch.nn.Linear(1024, 1024)]
        parts += [torch.nn.ReLU(), torch.nn.Linear(1024, 1024), torch.nn.Linear(1024, 10)]
        self.net = torch.nn.Sequential(*parts)

    def training_step(self, batch: list[torch.Tensor]) -> torch.Tensor:
        """Cross-entropy of random labels."""
        return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain SGD."""
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Clock(Callback):
    """CPU seconds of the training loop."""

    seconds = 0.0

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start."""
        self.begin = time.process_time()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop."""
        self.seconds = time.process_time() - self.begin


def measure(case: dict[str, Any] | None, num_steps: int) -> float:
    """CPU milliseconds for each optimizer step."""
    seed_everything(0, verbose=False)
    x = torch.randn(64 * ACCUMULATE * num_steps, 64)
    loader = DataLoader(TensorDataset(x, torch.arange(len(x)) % 10), batch_size=64)
    clock = Clock()
    monitors: list[Callback] = []
    if case is not None:
        monitor = CriticalBatchSizeMonitor(
            num_batches=ACCUMULATE, every_n_steps=1, max_overhead=None, save_figure=False, **case
        )
        monitors.append(monitor)
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        accumulate_grad_batches=ACCUMULATE,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[clock, *monitors],
    )
    trainer.fit(MLP(), loader)
    return 1e3 * clock.seconds / num_steps


def main() -> None:
    """Measure, print, and keep the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="also write the table and the numbers here")
    parser.add_argument("--quick", action="store_true", help="a few steps only, to try the script")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    rounds, num_steps = (1, 3) if arguments.quick else (5, 20)
    times: dict[str, list[float]] = {name: [] for name in CASES}
    for _ in range(rounds):
        for name, case in CASES.items():
            times[name].append(measure(case, num_steps))
    best = {name: min(values) for name, values in times.items()}
    table = Table("gradients", "CPU ms a step", "× no monitor", box=MARKDOWN)
    for name, value in best.items():
        table.add_row(name, f"{value:.1f}", f"{value / best['no monitor']:.2f}")
    console = Console(width=100)
    with console.capture() as lines:
        console.print(table)
    text = "\n".join(map(str.rstrip, lines.get().strip().splitlines())) + "\n"
    print(text)
    if arguments.output:
        arguments.output.mkdir(parents=True, exist_ok=True)
        (arguments.output / "gradient_sources_cpu.md").write_text(text)
        (arguments.output / "gradient_sources_cpu.json").write_text(
            json.dumps(best, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
