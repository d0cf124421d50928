"""Time of the ladder of tail indices beside a NumPy transcription of the paper's estimator, from one run each.

The transcription holds all samples in memory, as the estimator is written; the ladder gets them in chunks, and gives
thirteen levels with errors where the estimator has two. Rounds take turns, so that a busy machine slows both.

    python benchmarks/tail_index.py
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from operator import truediv
from pathlib import Path

import numpy as np
import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lightning_sgd import dyadic_tail_index, sample_stable

ALPHA = 1.5


@dataclass(frozen=True, slots=True)
class Result:
    """What one candidate takes.

    Attributes:
        dtype: Type of the samples.
        name: The candidate.
        seconds: Median CPU time.
        faster: Median over rounds of the transcription's time relative to this one's in the same round.
        alpha: The index that it finds; the truth is 1.5.
        rounds: Number of rounds.
    """

    dtype: str
    name: str
    seconds: float
    faster: float
    alpha: float
    rounds: int


def paper(X: np.ndarray) -> float:
    """The estimator as the paper and its code write it."""
    K = len(X)
    K1 = next(k for k in range(int(np.sqrt(K)), 0, -1) if K % k == 0)
    eps = np.spacing(1)
    Y = X.reshape(-1, K1).sum(axis=1)
    growth = np.log(np.abs(Y) + eps).mean() - np.log(np.abs(X) + eps).mean()
    return float(np.log(K1) / growth)


def ladder(chunks: Sequence[Tensor]) -> float:
    """Ours, on a stream."""
    return dyadic_tail_index(iter(chunks)).alpha


def seconds_of(call: Callable[[], float]) -> tuple[float, float]:
    """CPU time of one call, which other processes disturb less than wall time, and what it returns."""
    start = time.process_time()
    value = call()
    return time.process_time() - start, value


def compare(num: int, dtype: torch.dtype, rounds: int) -> list[Result]:
    """Both on the same samples, in turns; a part of the stream is drawn once and repeated."""
    part = sample_stable(
        ALPHA, min(num, 2**22), generator=torch.Generator().manual_seed(0), dtype=dtype
    )
    repeats = max(1, num // len(part))
    calls: dict[str, Callable[[], float]] = {"ladder, in chunks": lambda: ladder([part] * repeats)}
    whole = np.tile(part.numpy(), repeats)
    calls["paper, NumPy"] = lambda: paper(whole)
    times: dict[str, list[float]] = {name: [] for name in calls}
    found: dict[str, float] = {}
    for _ in range(rounds):
        for name, call in calls.items():
            taken, found[name] = seconds_of(call)
            times[name].append(taken)
    return [
        Result(
            str(dtype).removeprefix("torch."),
            name,
            statistics.median(taken),
            statistics.median(map(truediv, times["paper, NumPy"], taken)),
            found[name],
            rounds,
        )
        for name, taken in times.items()
    ]


def as_table(results: Sequence[Result]) -> Table:
    """The results, one line each."""
    table = Table(box=SIMPLE_HEAD)
    table.add_column("samples")
    table.add_column("estimator")
    for header in ("s", "× NumPy", "α"):
        table.add_column(header, justify="right")
    for result in results:
        numbers = (f"{result.seconds:.2f}", f"{result.faster:.1f}", f"{result.alpha:.3f}")
        table.add_row(result.dtype, result.name, *numbers)
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description="Time tail indices beside NumPy.")
    parser.add_argument("--samples", type=float, default=1e8, help="how many (default: 1e8)")
    parser.add_argument("--rounds", type=int, default=3, help="how many (default: 3)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the numbers there")
    parser.add_argument(
        "--quick", action="store_true", help="a hundredth of the samples, one round"
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    num, rounds = (1e6, 1) if options.quick else (options.samples, options.rounds)
    results = []
    for dtype in (torch.float32, torch.float64):
        results += compare(int(num), dtype, rounds)
    Console(width=100).print(as_table(results))
    on = f"{platform.machine()} CPU, threads: {torch.get_num_threads()}, torch {torch.__version__}, {num:.0e} samples"
    print(f"{on}. Medians over {rounds} rounds.")
    if options.json:
        record = {"on": on, "results": [asdict(result) for result in results]}
        options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
