"""Time a step of the learning-rate schedulers beside torch's: one table from one run.

python benchmarks/lr_schedulers.py
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from rich.console import Console
from rich.table import Table
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler

from lightning_sgd import BiasedSGDLR, BiasedSGDProblem, DiminishingLR

BASELINE = "LambdaLR"
CANDIDATES: dict[str, Callable[[Optimizer], LRScheduler]] = {
    BASELINE: partial(LambdaLR, lr_lambda=lambda step: 1 / (1 + step)),
    "CosineAnnealingLR": partial(CosineAnnealingLR, T_max=10**6),
    "DiminishingLR, smooth": partial(DiminishingLR, mu=0.01, L=1.0),
    "DiminishingLR, doubling": partial(
        DiminishingLR, mu=0.01, L=1.0, form="doubling", theorem="hogwild"
    ),
    "BiasedSGDLR, closed form": partial(
        BiasedSGDLR, problem=BiasedSGDProblem(m=0.01, L=1.0, G2=0.1), U0=1.0, delta=0.001
    ),
    "BiasedSGDLR, searching": partial(
        BiasedSGDLR,
        problem=BiasedSGDProblem(m=0.001, L=10.0, G2=1.0),
        U0=1e9,
        delta=0.005,
        max_lr=1.0,
    ),
}


def make(name: str, num_groups: int) -> LRScheduler:
    """A scheduler on an optimizer whose groups hold one number each."""
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))]} for _ in range(num_groups)]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    scheduler = CANDIDATES[name](optimizer)
    optimizer.step()
    return scheduler


def time_rounds(num_groups: int, num_rounds: int, num_steps: int = 100) -> dict[str, list[float]]:
    """Microseconds per step, round by round, in random order within a round."""
    schedulers = {name: make(name, num_groups) for name in CANDIDATES}
    times: dict[str, list[float]] = {name: [] for name in CANDIDATES}
    order = list(CANDIDATES)
    for _ in range(num_rounds):
        random.shuffle(order)
        for name in order:
            start = time.perf_counter()
            for _ in range(num_steps):
                schedulers[name].step()
            times[name].append(1e6 * (time.perf_counter() - start) / num_steps)
    return times


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Time learning-rate schedulers.")
    parser.add_argument("--quick", action="store_true", help="only show that everything runs")
    num_rounds = 3 if parser.parse_args().quick else 100
    random.seed(0)
    table = Table("groups", "scheduler", "µs per step", "ratio")
    for num_groups in (1, 10):
        times = time_rounds(num_groups, num_rounds)
        for name, values in times.items():
            ratio = statistics.median(
                ours / base for ours, base in zip(values, times[BASELINE], strict=True)
            )
            table.add_row(str(num_groups), name, f"{statistics.median(values):.1f}", f"{ratio:.2f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
