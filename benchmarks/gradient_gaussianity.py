"""Time of tests of normality for many samples beside a loop of SciPy, and of a whole verdict, from one run each.

One sample is the projection of 256 gradients on one direction; a look of the monitor tests some hundred directions, and
its calibration two hundred times as many. Rounds take turns, so that a busy machine slows both.

    python benchmarks/gradient_gaussianity.py
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from operator import truediv
from pathlib import Path

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from scipy import stats
from torch import Tensor

from lightning_sgd import anderson_darling, gradient_gaussianity, jarque_bera, shapiro_wilk

PAIRS: dict[str, tuple[Callable[[Tensor], object], Callable[..., object]]] = {
    "Shapiro-Wilk": (shapiro_wilk, stats.shapiro),
    "Anderson-Darling": (anderson_darling, stats.anderson),
    "Jarque-Bera": (jarque_bera, stats.jarque_bera),
}


@dataclass(frozen=True, slots=True)
class Result:
    """What one candidate takes.

    Attributes:
        test: Name of the test.
        dtype: Type of the samples.
        milliseconds: Median CPU time for all samples.
        scipy_milliseconds: The same of the loop.
        faster: Median over rounds of the loop's time relative to this one's in the same round.
    """

    test: str
    dtype: str
    milliseconds: float
    scipy_milliseconds: float
    faster: float


def milliseconds_of(call: Callable[[], object]) -> float:
    """CPU time, which other processes disturb less than wall time."""
    start = time.process_time()
    call()
    return 1e3 * (time.process_time() - start)


def compare(name: str, samples: Tensor, rounds: int) -> Result:
    """One test on the same samples, in turns."""
    batched, single = PAIRS[name]
    rows = samples.numpy()
    ours, theirs = [], []
    batched(samples)  # weights are made once
    for _ in range(rounds):
        ours.append(milliseconds_of(lambda: batched(samples)))
        theirs.append(milliseconds_of(lambda: [single(row) for row in rows]))
    return Result(
        name,
        str(samples.dtype).removeprefix("torch."),
        statistics.median(ours),
        statistics.median(theirs),
        statistics.median(map(truediv, theirs, ours)),
    )


def time_verdicts(rounds: int, coordinates: Sequence[int]) -> dict[int, float]:
    """Seconds of a verdict with the settings of the monitor, by number of coordinates."""
    found = {}
    for num in coordinates:
        rows = torch.randn(256, num, generator=torch.Generator().manual_seed(0))
        times = [milliseconds_of(partial(gradient_gaussianity, rows)) for _ in range(rounds)]
        found[num] = statistics.median(times) / 1e3
    return found


def as_table(results: Sequence[Result]) -> Table:
    """The results, one line each."""
    table = Table(box=SIMPLE_HEAD)
    for header in ("test", "samples"):
        table.add_column(header)
    for header in ("ms", "SciPy, ms", "× SciPy"):
        table.add_column(header, justify="right")
    for r in results:
        numbers = (f"{r.milliseconds:.1f}", f"{r.scipy_milliseconds:.0f}", f"{r.faster:.0f}")
        table.add_row(r.test, r.dtype, *numbers)
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description="Time tests of normality beside SciPy.")
    parser.add_argument("--rows", type=int, default=1000, help="samples (default: 1000)")
    parser.add_argument("--length", type=int, default=256, help="values in each (default: 256)")
    parser.add_argument("--rounds", type=int, default=7, help="how many (default: 7)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the numbers there")
    parser.add_argument("--quick", action="store_true", help="a tenth of the samples, one round")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", FutureWarning)  # about SciPy's result object of old
    rows, rounds = (options.rows // 10, 1) if options.quick else (options.rows, options.rounds)
    generator = torch.Generator().manual_seed(0)
    results = []
    for dtype in (torch.float32, torch.float64):
        samples = torch.randn(rows, options.length, generator=generator, dtype=dtype)
        results += [compare(name, samples, rounds) for name in PAIRS]
    Console(width=100).print(as_table(results))
    verdicts = time_verdicts(1 if options.quick else 3, (10**4, 131072))
    for num, seconds in verdicts.items():
        print(f"Verdict on 256 gradients of {num} coordinates, calibrated: {seconds:.2f} s")
    on = f"{platform.machine()} CPU, one thread, torch {torch.__version__}, {rows} × {options.length}"
    print(f"{on}. CPU times, medians over {rounds} rounds.")
    if options.json:
        record = {"on": on, "results": [asdict(r) for r in results], "verdict_seconds": verdicts}
        options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
