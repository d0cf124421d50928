"""Priority sampling: draws and updates beside what users have today, its cost per training step, and by ranks.

    python benchmarks/priority_sampling.py

Times are CPU times of one thread. The first table draws batches of 256 with weights that change between draws, which
is what priorities need; peers that freeze their weights are built anew. The second trains the CNN of the demo with and
without the callback, in turns. The third times draw, all-gather and update on several processes of this machine.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch import Trainer, seed_everything
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table
from torch.multiprocessing.spawn import start_processes
from torch.utils.data import WeightedRandomSampler

from lightning_sgd import (
    DigitsClassifier,
    DigitsDataModule,
    MaSS,
    PrioritySampler,
    PrioritySampling,
    SumTree,
)

BATCH = 256
LATENCY, BANDWIDTH = 25e-6, 10e9
"""Of the network to which the collective is extrapolated: seconds per message, bytes per second."""


@dataclass(frozen=True, slots=True)
class Result:
    """One way to draw.

    Attributes:
        peer: Its name.
        num_samples: Size of the data set.
        draw: Microseconds for a batch, with what the peer has to build for it.
        update: Microseconds to change the weights of a batch.
        ratio: Of both together to the sum tree, in this run.
    """

    peer: str
    num_samples: int
    draw: float
    update: float
    ratio: float = 1.0


def cpu_time(function: Callable[[], object], seconds: float = 0.3) -> float:
    """Median CPU time of a call in microseconds."""
    function()
    times: list[float] = []
    end = time.process_time() + seconds
    while len(times) < 3 or time.process_time() < end:
        start = time.process_time()
        function()
        times.append(time.process_time() - start)
    return 1e6 * median(times)


def draws(num: int) -> list[Result]:
    """All peers with as many samples."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(num, generator=generator, dtype=torch.float64) + 1e-3
    indices = torch.randint(num, (BATCH,), generator=generator)
    new = torch.rand(BATCH, generator=generator, dtype=torch.float64) + 1e-3
    tree = SumTree(num)
    tree.rebuild(weights)
    random, array = np.random.default_rng(0), weights.numpy()
    singles = weights.float()

    def scatter() -> None:
        weights[indices] = new

    def sampler() -> list[int]:
        return list(WeightedRandomSampler(weights, BATCH))  # type: ignore[arg-type]  # takes tensors

    def draw_tree() -> object:
        tree._running = None  # as after an update
        return tree.sample(BATCH, generator)

    peers: dict[str, Callable[[], object]] = {
        "WeightedRandomSampler": sampler,
        "torch.multinomial": lambda: torch.multinomial(weights, BATCH, True, generator=generator),
        "numpy Generator.choice": lambda: random.choice(num, BATCH, p=array / array.sum()),
        "cumsum and searchsorted": lambda: torch.searchsorted(
            weights.cumsum(0), torch.rand(BATCH, generator=generator) * weights.sum()
        ),
    }
    if num <= 2**24:
        peers["torch.multinomial, float32"] = lambda: torch.multinomial(
            singles, BATCH, True, generator=generator
        )
    ours = Result("SumTree", num, cpu_time(draw_tree), cpu_time(lambda: tree.set(indices, new)))
    update = cpu_time(scatter)
    results = [ours]
    for name, function in peers.items():
        draw = cpu_time(function)
        results.append(Result(name, num, draw, update, (draw + update) / (ours.draw + ours.update)))
    return results


class DemoCNN(DigitsClassifier):
    """The network of the demo."""

    def __init__(self) -> None:
        super().__init__(architecture="cnn", batch_norm=True)

    def configure_optimizers(self) -> MaSS:
        """As in the demo."""
        return MaSS(self.parameters(), lr=0.1)


def step_time(callbacks: list[PrioritySampling], batch_size: int, epochs: int) -> float:
    """CPU milliseconds per step of a training, start and end included."""
    seed_everything(0, verbose=False)
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        callbacks=list(callbacks),
    )
    data = DigitsDataModule(batch_size=batch_size)
    start = time.process_time()
    trainer.fit(DemoCNN(), data)
    return 1e3 * (time.process_time() - start) / trainer.global_step


def overheads(quick: bool) -> Table:
    """What the callback adds to a training step, by batch size."""
    table = Table("batch", "ms/step without", "with", "overhead", "quartiles")
    for batch_size in (64, 256):
        rounds = 2 if quick else 7
        epochs = 2 if quick else 10 * batch_size // 64
        pairs = []
        for _ in range(rounds):
            plain = step_time([], batch_size, epochs)
            pairs.append(
                (plain, step_time([PrioritySampling(save_figure=False)], batch_size, epochs))
            )
        ratios = sorted(ours / plain - 1 for plain, ours in pairs[1:])
        middle = median(ratios)
        low, high = ratios[len(ratios) // 4], ratios[(3 * len(ratios)) // 4]
        table.add_row(
            str(batch_size),
            f"{median(plain for plain, _ in pairs):.2f}",
            f"{median(ours for _, ours in pairs):.2f}",
            f"{middle:.1%}",
            f"{low:.1%} – {high:.1%}",
        )
    return table


def work(rank: int, num_ranks: int, folder: str, num_steps: int) -> None:
    """Draw, exchange and update on one of several ranks; the first writes the times down."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/{num_ranks}",
        rank=rank,
        world_size=num_ranks,
        timeout=timedelta(seconds=60),
    )
    sampler = PrioritySampler(1_000_000, BATCH // num_ranks, num_ranks, rank, warmup_epochs=0)
    scores = torch.rand(BATCH // num_ranks)
    cpu = waited = 0.0
    start = time.perf_counter()
    for _ in range(num_steps):
        begin = time.process_time()
        sampler.draw()
        draw = sampler.take()
        cpu += time.process_time() - begin
        begin = time.perf_counter()
        parts = [torch.empty_like(scores) for _ in range(num_ranks)]
        if num_ranks > 1:
            dist.all_gather(parts, scores)
        else:
            parts = [scores]
        waited += time.perf_counter() - begin
        begin = time.process_time()
        sampler.update(draw, torch.cat(parts))
        cpu += time.process_time() - begin
    total = time.perf_counter() - start
    if rank == 0:
        times = [
            1e6 * cpu / num_steps,
            1e6 * waited / num_steps,
            num_steps * BATCH / num_ranks / total,
        ]
        Path(folder, f"{num_ranks}.json").write_text(json.dumps(times))
    dist.destroy_process_group()


def by_ranks(quick: bool) -> Table:
    """Samples per second on 1, 2 and 4 processes, and what the exchange would take on a network."""
    table = Table(
        "ranks", "sampler, µs CPU", "all-gather, µs here", "µs on a network *", "samples/s per rank"
    )
    num_steps = 20 if quick else 1000
    with tempfile.TemporaryDirectory() as folder:
        for num_ranks in (1, 2, 4):
            arguments = (num_ranks, folder, num_steps)
            start_processes(work, args=arguments, nprocs=num_ranks, start_method="fork")
            cpu, waited, speed = json.loads(Path(folder, f"{num_ranks}.json").read_text())
            there = (num_ranks - 1) * (LATENCY + 4 * BATCH / num_ranks / BANDWIDTH)
            table.add_row(
                str(num_ranks), f"{cpu:.0f}", f"{waited:.0f}", f"{1e6 * there:.0f}", f"{speed:,.0f}"
            )
        for num_ranks in (64,):
            there = (num_ranks - 1) * (LATENCY + 4 * BATCH / num_ranks / BANDWIDTH)
            table.add_row(str(num_ranks), "–", "–", f"{1e6 * there:.0f}", "–")
    return table


def table_of(results: list[Result]) -> Table:
    """One row per peer and size."""
    table = Table("samples", "peer", "µs/draw", "µs/update", "ratio")
    for r in results:
        times = (f"{r.draw:.0f}", f"{r.update:.0f}", f"{r.ratio:.1f}")
        table.add_row(f"{r.num_samples:.0e}", r.peer, *times)
    return table


def save_table(path: Path, table: Table) -> None:
    """Write the table as a fragment that documentation can include."""
    table.box = MARKDOWN
    console = Console(width=120)
    with console.capture() as lines:
        console.print(table)
    path.write_text("\n".join(map(str.rstrip, lines.get().strip().splitlines())) + "\n")


def main() -> None:
    """Measure, print, and keep the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = ("draws", "step", "ranks")
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts, help="what to measure")
    parser.add_argument("--output", type=Path, metavar="DIR", help="also write the tables here")
    parser.add_argument("--quick", action="store_true", help="small sizes only, to try the script")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    sizes = (10**4,) if options.quick else (10**5, 10**6, 10**7)
    stems = {"draws": "cpu", "step": "step", "ranks": "ranks"}
    for part in options.parts:
        if part == "draws":
            table = table_of([result for size in sizes for result in draws(size)])
        elif part == "step":
            with contextlib.redirect_stderr(io.StringIO()):
                table = overheads(options.quick)
        else:
            table = by_ranks(options.quick)
        Console(width=110).print(table)
        if options.output:
            save_table(options.output / f"priority_sampling_{stems[part]}.md", table)
    network = f"{1e6 * LATENCY:.0f} µs and {BANDWIDTH / 1e9:.0f} GB/s"
    print(f"* extrapolated, not measured: a ring with {network} per message")


if __name__ == "__main__":
    main()
