"""Compare strategies that exchange models with DDP and Lightning's post-local SGD: steps per second, bytes per step.

All ranks share one machine and its loopback interface, which is the best case for DDP: what the others save is waiting
and bytes, and loopback has plenty of both. Runs are taken in turns, so that whatever else the machine does meets all.

    python benchmarks/local_sgd.py --output docs/results/local_sgd_cpu.md
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from statistics import median
from textwrap import fill
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, Strategy
from rich.progress import track
from torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook import (
    PostLocalSGDState,
    post_localSGD_hook,
)
from torch.utils.data import DataLoader, TensorDataset

from lightning_sgd import GossipPGAStrategy, LocalSGDStrategy, OverlapLocalSGDStrategy
from lightning_sgd._protocols import CountsTraffic
from lightning_sgd.functional.distributed.traffic import all_reduce_traffic
from lightning_sgd.strategies._base.unwrapped import listen_for_sigterm_every

WARM_UP = 10
SELDOM = 100
PROCESSES: dict[str, Any] = {"start_method": "fork", "timeout": timedelta(seconds=60)}
"""Settings of every strategy."""


class MLP(LightningModule):
    """A model for small batches, so that communication is a good part of a step."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(
            torch.nn.Linear(width, width), torch.nn.ReLU(), torch.nn.Linear(width, 10)
        )

    def training_step(self, batch: list[torch.Tensor]) -> torch.Tensor:
        """Return the cross-entropy of random labels."""
        return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return SGD with momentum."""
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


class Stopwatch(Callback):
    """Saves the seconds per step on rank 0, after a warm-up, and the traffic counted by the strategy."""

    def __init__(self, file: Path) -> None:
        self.file, self.begin = file, 0.0

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Start the clock after the warm-up."""
        if trainer.global_step == WARM_UP:
            self.begin = time.perf_counter()

    def on_train_end(self, trainer: Trainer, *_: Any) -> None:
        """Stop the clock, and save what was measured."""
        measured = {"seconds": (time.perf_counter() - self.begin) / (trainer.global_step - WARM_UP)}
        if isinstance(trainer.strategy, CountsTraffic) and trainer.strategy.traffic is not None:
            measured["blocked"] = trainer.strategy.traffic.seconds / trainer.global_step
            measured["bytes"] = trainer.strategy.traffic.num_bytes / trainer.global_step
        if trainer.is_global_zero:
            torch.save(measured, self.file)


class HeardDDP(DDPStrategy):
    """DDP that agrees on SIGTERM as rarely as the strategies of this package.

    Args:
        sigterm_every_n_batches: Period of the agreement, in batches.
        **settings: Settings of DDP.
    """

    def __init__(self, sigterm_every_n_batches: int, **settings: Any) -> None:
        super().__init__(**settings)
        self.sigterm_every_n_batches = sigterm_every_n_batches

    def on_train_start(self) -> None:
        """Reduce the number of Lightning's broadcasts."""
        assert self.lightning_module is not None
        listen_for_sigterm_every(self.sigterm_every_n_batches, self.lightning_module.trainer)


def post_local_sgd(period: int, **settings: Any) -> Strategy:
    """Return Lightning's post-local SGD, with torch's averager."""
    state = PostLocalSGDState(process_group=None, subgroup=None, start_localSGD_iter=0)
    return HeardDDP(
        ddp_comm_state=state,
        ddp_comm_hook=post_localSGD_hook,
        model_averaging_period=period,
        **settings,
    )


def candidates(periods: Sequence[int]) -> dict[str, Callable[..., Strategy]]:
    """Return constructors by label, to be called with ``sigterm_every_n_batches`` and ``PROCESSES``."""
    found: dict[str, Callable[..., Strategy]] = {"DDP": HeardDDP}
    for h in periods:
        found[f"post-local SGD of Lightning, H = {h}"] = partial(post_local_sgd, h)
    for h in periods:
        found[f"Local SGD, H = {h}"] = partial(LocalSGDStrategy, h)
    for h in periods:
        found[f"Overlap-Local-SGD, τ = {h}"] = partial(OverlapLocalSGDStrategy, h)
    found["gossip, one peer"] = partial(GossipPGAStrategy, "one_peer_exponential", None)
    found["Gossip-PGA, one peer, H = 6"] = partial(GossipPGAStrategy, "one_peer_exponential", 6)
    return found


def measure(
    strategy: Strategy, width: int, batch_size: int, num_steps: int, num_ranks: int
) -> dict[str, float]:
    """Train once, and return what was measured."""
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


Runs = dict[tuple[str, int], list[dict[str, float]]]
"""Measurements of every round, by label and period of the agreement on SIGTERM."""


def measure_all(args: argparse.Namespace) -> Runs:
    """Train with every candidate in every round."""
    found = candidates(args.periods)
    runs: Runs = {(name, every): [] for name in found for every in (1, SELDOM)}
    shape = args.width, args.batch_size, args.num_steps, args.num_ranks
    for _ in track(range(args.rounds), "Measuring ...", transient=True):
        for (name, every), results in runs.items():
            strategy = found[name](sigterm_every_n_batches=every, **PROCESSES)
            results.append(measure(strategy, *shape))
    return runs


def speed(runs: Runs, name: str, every: int) -> tuple[str, str]:
    """Return steps per second, and their ratio to those of DDP in the same round."""
    ours, ddp = ([run["seconds"] for run in runs[key, every]] for key in (name, "DDP"))
    ratio = median(theirs / mine for theirs, mine in zip(ddp, ours, strict=True))
    return f"{1 / median(ours):.0f}", f"{ratio:.2f}"


def as_table(runs: Runs, ddp_bytes: float) -> str:
    """Write a Markdown table with one line per candidate."""
    titles = ["strategy", "steps/s", "× DDP", "steps/s, seldom", "× DDP, seldom"]
    titles += ["ms waited per step", "kB sent per step and rank"]
    lines = [titles, ["---", *["---:"] * (len(titles) - 1)]]
    for name in dict.fromkeys(name for name, _ in runs):
        results = runs[name, SELDOM]
        waited, sent = "–", f"≥ {ddp_bytes / 1e3:.1f}"
        if "bytes" in results[0]:
            waited = f"{1e3 * median(run['blocked'] for run in results):.2f}"
            sent = f"{results[0]['bytes'] / 1e3:.1f}"
        lines.append([name, *speed(runs, name, 1), *speed(runs, name, SELDOM), waited, sent])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def as_page(table: str, args: argparse.Namespace, num_parameters: int) -> str:
    """Write the command, the table and the conditions of the measurement."""
    command = " ".join(["python benchmarks/local_sgd.py", *sys.argv[1:]])
    ranks = f"{args.num_ranks} ranks of one thread"
    conditions = (
        f"{num_parameters} parameters, batches of {args.batch_size}, {ranks} on one machine with "
        f"{os.cpu_count()} cores ({processor()}), torch {torch.__version__}, gloo over loopback. "
        f"Medians of {args.rounds} rounds of {args.num_steps} steps, "
        f"ratios to DDP in the same round and column. “Seldom”: all ranks agree on SIGTERM every {SELDOM} batches, not "
        "before every batch, as Lightning has it; DDP too. Waiting is that of these runs. Bytes of DDP and of "
        "Lightning's post-local SGD, which on a CPU is DDP with averages on top: those of the gradients."
    )
    return f"`{command}`\n\n{table}\n\n{fill(conditions, 120)}\n"


def processor() -> str:
    """Return the name of the processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else "unknown processor"


def main() -> None:
    """Measure in turns, and print the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--periods", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--num-steps", type=int, default=200)
    parser.add_argument("--num-ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, help="Markdown file for the page")
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    num_parameters = sum(param.numel() for param in MLP(args.width).parameters())
    ddp_bytes, _ = all_reduce_traffic(4 * num_parameters, args.num_ranks)
    page = as_page(as_table(measure_all(args), ddp_bytes), args, num_parameters)
    print(page)
    if args.output:
        args.output.write_text(page)


if __name__ == "__main__":
    main()
