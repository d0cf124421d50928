"""Compare the sharded exchange of ByzantineStrategy with the all-reduce of gloo: time and bytes for one gradient.

Every line combines the gradients of all ranks: copy them into a buffer, communicate, combine, copy back. Lines are
timed in turns, so that other load on the machine affects all of them. "All-gather" is the cost if every rank combines
everything.

    python benchmarks/byzantine.py
    python benchmarks/byzantine.py --num-ranks 8 --num-parameters 100000
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from statistics import median

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.distributed as dist
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.multiprocessing.spawn import start_processes

from lightning_sgd import get_aggregator
from lightning_sgd.functional.distributed.traffic import all_reduce_traffic, send_traffic
from lightning_sgd.strategies._base.replica import GradientReplica
from lightning_sgd.strategies._comm.all_to_all import AllToAll
from lightning_sgd.strategies._comm.collectives import Purpose
from lightning_sgd.strategies.byzantine.sharded_rule import NoResult, ShardedRule

RULES = ("mean", "filter", "median", "trmean", "geomed", "mda", "nnm+trmean")
Step = Callable[[], None]


class Bench:
    """The lines of the table on one rank.

    Args:
        num_parameters: Length of the gradient [d].
        num_byzantine: Number of faulty workers that the rules expect [f].
    """

    def __init__(self, num_parameters: int, num_byzantine: int) -> None:
        self.exchange = AllToAll(timedelta(seconds=60))
        generator = torch.Generator().manual_seed(self.exchange.rank)
        self.param = torch.zeros(num_parameters, requires_grad=True)
        self.param.grad = torch.randn(num_parameters, generator=generator)
        optimizer = torch.optim.SGD([self.param], lr=0.1)
        self.replica = GradientReplica(0, optimizer, self.exchange.num_ranks, {})
        self.buffer = torch.empty(num_parameters)
        self.num_byzantine = num_byzantine

    def all_reduce(self) -> None:
        """Average the gradients as DDP does, in one bucket."""
        assert self.param.grad is not None
        self.buffer.copy_(self.param.grad)
        dist.all_reduce(self.buffer)
        self.buffer.div_(self.exchange.num_ranks)
        self.param.grad.copy_(self.buffer)

    def all_gather(self) -> None:
        """Gather all gradients on every rank, and combine them there."""
        assert self.param.grad is not None
        rows = [torch.empty_like(self.buffer) for _ in range(self.exchange.num_ranks)]
        dist.all_gather(rows, self.param.grad)
        self.param.grad.copy_(get_aggregator("filter", self.num_byzantine)(rows))

    def sharded(self, name: str) -> Step:
        """Return a step as the strategy takes it."""
        rule = ShardedRule(get_aggregator(name, self.num_byzantine))

        def step() -> None:
            replica, exchange = self.replica, self.exchange
            replica.pack(1.0, absent=False)
            columns, metadata = replica.scatter(exchange, replica.gradients.rows)
            absent = [num_absent for _, num_absent in metadata]
            plan = rule.decide(columns, absent, None, exchange, 0)
            assert not isinstance(plan, NoResult)
            result: Tensor = replica.gather(exchange, rule.carry_out(plan, columns, None))
            replica.gradients.unpack(result, replica.gradients.used)
            replica.clear()

        return step

    def parts(self) -> None:
        """Take the first part of the exchange only: every rank receives its shard of all rows."""
        self.replica.pack(1.0, absent=False)
        self.replica.scatter(self.exchange, self.replica.gradients.rows)
        self.replica.clear()

    def sums(self) -> None:
        """Take the second part only: norms and inner products are summed over the ranks."""
        self.exchange.all_reduce_sum(torch.zeros(20, dtype=torch.float64), Purpose.GRADIENTS, 0)

    def results(self) -> None:
        """Take the third part only: every rank receives the combined shards of all others."""
        shard = self.buffer[: self.replica.gradients.shard_size]
        self.replica.gather(self.exchange, shard)

    def lines(self) -> dict[str, Step]:
        """Return all lines of the table by name."""
        found: dict[str, Step] = {"all-reduce of gloo": self.all_reduce}
        found |= {"parts alone": self.parts, "sums alone": self.sums, "results alone": self.results}
        found |= {f"sharded {name}": self.sharded(name) for name in RULES}
        return {**found, "all-gather, then filter": self.all_gather}


@torch.no_grad()
def work(rank: int, args: argparse.Namespace, folder: Path) -> None:
    """Time all lines on one rank."""
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=args.num_ranks
    )
    bench = Bench(args.num_parameters, args.num_byzantine)
    lines, original = bench.lines(), bench.param.grad
    assert original is not None
    kept = original.clone()
    seconds: dict[str, list[float]] = {name: [] for name in lines}
    sent: dict[str, float] = {}
    for _ in range(args.rounds + 1):
        for name, step in lines.items():
            dist.barrier()
            bench.exchange.traffic.num_bytes = 0.0
            begin = time.perf_counter()
            for _ in range(args.repeats):
                original.copy_(kept)
                step()
            seconds[name].append((time.perf_counter() - begin) / args.repeats)
            sent[name] = bench.exchange.traffic.num_bytes / args.repeats
    if rank == 0:
        torch.save(({name: times[1:] for name, times in seconds.items()}, sent), folder / "found")


def main() -> None:
    """Time all lines in turns, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-ranks", type=int, default=4)
    parser.add_argument("--num-parameters", type=int, default=1_000_000)
    parser.add_argument("--num-byzantine", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, help="Markdown file for the table")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        start_processes(work, args=(args, Path(folder)), nprocs=args.num_ranks, start_method="fork")
        seconds, sent = torch.load(Path(folder) / "found")

    gradient = 4 * args.num_parameters
    ring, _ = all_reduce_traffic(gradient, args.num_ranks)
    sent["all-reduce of gloo"] = ring
    sent["all-gather, then filter"], _ = send_traffic(gradient, args.num_ranks - 1)
    table = Table(box=MARKDOWN)
    for heading in ("one gradient", "ms", "× all-reduce", "kB sent per rank", "× all-reduce"):
        table.add_column(heading, justify="left" if heading == "one gradient" else "right")
    baseline = seconds["all-reduce of gloo"]
    for name, times in seconds.items():
        ratio = median(x / y for x, y in zip(times, baseline, strict=True))
        numbers = f"{1e3 * median(times):.1f}", f"{ratio:.2f}"
        table.add_row(name, *numbers, f"{sent[name] / 1e3:.1f}", f"{sent[name] / ring:.4f}")
    console = Console(width=120, record=True)
    console.print(table)
    print(
        f"{args.num_parameters} parameters, f = {args.num_byzantine}, {args.num_ranks} ranks of one thread on one "
        f"machine, gloo over loopback; medians of {args.rounds} rounds, ratios within a round."
    )
    if args.output:
        lines = map(str.rstrip, console.export_text().splitlines())  # rich pads every line
        args.output.write_text("\n".join(lines).strip() + "\n")


if __name__ == "__main__":
    main()
