"""Local SGD beside DDP and Lightning's own post-local SGD: steps per second and bytes per step, in turns.

All ranks share one machine and its loopback interface, which is the best case for DDP: what Local SGD saves is waiting
and bytes, and loopback has plenty of both. Rounds are taken in turns, so that whatever else the machine does meets all.

    python benchmarks/local_sgd.py
"""

from __future__ import annotations

import argparse
import logging
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, Strategy
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table
from torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook import (
    PostLocalSGDState,
    post_localSGD_hook,
)
from torch.utils.data import DataLoader, TensorDataset

from lightning_sgd import LocalSGDStrategy
from lightning_sgd.functional.traffic import all_reduce_traffic

WARM_UP = 10
PROCESSES: dict[str, Any] = {"start_method": "fork", "timeout": timedelta(seconds=60)}


class MLP(LightningModule):
    """Small batches, so that the exchange is a good part of a step."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(
            torch.nn.Linear(width, width), torch.nn.ReLU(), torch.nn.Linear(width, 10)
        )

    def training_step(self, batch: list[torch.Tensor]) -> torch.Tensor:
        """Cross-entropy of random labels."""
        return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """As most people do."""
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


class Stopwatch(Callback):
    """Writes down the seconds per step on rank 0, after a warm-up, and what the strategy has counted."""

    def __init__(self, file: Path) -> None:
        self.file, self.begin = file, 0.0

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Start after the warm-up."""
        if trainer.global_step == WARM_UP:
            self.begin = time.perf_counter()

    def on_train_end(self, trainer: Trainer, *_: Any) -> None:
        """Stop."""
        seconds = (time.perf_counter() - self.begin) / (trainer.global_step - WARM_UP)
        exchange = getattr(trainer.strategy, "exchange", None)
        sent = exchange.traffic.num_bytes / trainer.global_step if exchange else float("nan")
        if trainer.is_global_zero:
            torch.save({"seconds": seconds, "bytes": sent}, self.file)


def post_local_sgd(period: int) -> Strategy:
    """Lightning's, with torch's averager."""
    state = PostLocalSGDState(process_group=None, subgroup=None, start_localSGD_iter=0)
    return DDPStrategy(
        ddp_comm_state=state,
        ddp_comm_hook=post_localSGD_hook,
        model_averaging_period=period,
        **PROCESSES,
    )


def candidates(periods: list[int]) -> dict[str, Callable[[], Strategy]]:
    """What is compared."""
    found: dict[str, Callable[[], Strategy]] = {"DDP": lambda: DDPStrategy(**PROCESSES)}
    for h in periods:
        found[f"post-local SGD of Lightning, H = {h}"] = lambda h=h: post_local_sgd(h)  # type: ignore[misc]
    for h in periods:
        found[f"Local SGD, H = {h}"] = lambda h=h: LocalSGDStrategy(period=h, **PROCESSES)  # type: ignore[misc]
        found[f"Local SGD, H = {h}, SIGTERM heard every 100 batches"] = (  # type: ignore[misc]
            lambda h=h: LocalSGDStrategy(period=h, sigterm_every_n_batches=100, **PROCESSES)
        )
    return found


def measure(
    strategy: Strategy, width: int, batch_size: int, num_steps: int, num_ranks: int
) -> dict[str, float]:
    """One run."""
    count = batch_size * num_steps * num_ranks
    x = torch.randn(count, width, generator=torch.Generator().manual_seed(0))
    data = DataLoader(TensorDataset(x, torch.arange(count) % 10), batch_size=batch_size)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "measured"
        trainer = Trainer(
            accelerator="cpu",
            devices=num_ranks,
            strategy=strategy,
            max_epochs=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[Stopwatch(file)],
        )
        trainer.fit(MLP(width), data)
        result: dict[str, float] = torch.load(file)
    return result


def main() -> None:
    """Measure in turns, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--periods", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--num-steps", type=int, default=200)
    parser.add_argument("--num-ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, help="Markdown file for the table")
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")

    found = candidates(args.periods)
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in found}
    for _ in range(args.rounds):
        for name, make in found.items():
            shape = args.width, args.batch_size, args.num_steps, args.num_ranks
            runs[name].append(measure(make(), *shape))

    num_parameters = sum(param.numel() for param in MLP(args.width).parameters())
    ddp_bytes, _ = all_reduce_traffic(4 * num_parameters, args.num_ranks)
    table = Table(box=MARKDOWN)
    for heading in ("strategy", "steps/s", "× DDP", "kB sent per step and rank"):
        table.add_column(heading, justify="left" if heading == "strategy" else "right")
    for name, results in runs.items():
        seconds = median(result["seconds"] for result in results)
        ratio = median(
            ddp["seconds"] / result["seconds"]
            for ddp, result in zip(runs["DDP"], results, strict=True)
        )
        counted = results[0]["bytes"]
        sent = f"{counted / 1e3:.1f}" if counted == counted else f"≥ {ddp_bytes / 1e3:.1f}"
        table.add_row(name, f"{1 / seconds:.0f}", f"{ratio:.2f}", sent)
    console = Console(width=120, record=True)
    console.print(table)
    print(
        f"{num_parameters} parameters, batches of {args.batch_size}, {args.num_ranks} ranks of one thread on one "
        f"machine, gloo over loopback; medians of {args.rounds} rounds, ratios within a round. Bytes of DDP and of "
        "Lightning's post-local SGD, which on a CPU is DDP with averages on top: those of the gradients."
    )
    if args.output:
        args.output.write_text(console.export_text())


if __name__ == "__main__":
    main()
