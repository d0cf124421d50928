"""Gradients of few bits: planned against constant step sizes, with the bounds, also where the theory gives up.

Logistic regression on handwritten digits, "below five" against the rest. Every sample's gradient is rounded to a
uniform grid that just holds its largest number. All runs of a row are made at once.

    python examples/reproductions/biased_sgd_bits.py
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import NamedTuple

import torch
from _shared import LogisticDigits, arguments, save_table
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from lightning_sgd import (
    BiasedSGDProblem,
    biased_sgd_bound,
    biased_sgd_floor,
    biased_sgd_step_bound,
    max_relative_error,
    optimal_step,
)

PENALTY = 0.1
NUM_RUNS, NUM_STEPS = 200, 3000
BITS = (32, 8, 6, 4, 3, 2)
CONSTANT = (0.5, 0.05, 0.005)
"""Constant step sizes in units of 1/L."""


class Task(NamedTuple):
    """Logistic regression.

    Attributes:
        data: The images, and the optimum.
        problem: What the analysis knows about it.
        U0: Squared distance of zero from the optimum.
    """

    data: LogisticDigits
    problem: BiasedSGDProblem
    U0: float


@dataclass(frozen=True)
class Row:
    """What one schedule did with gradients of some bits.

    Attributes:
        bits: Bits per number; 32 for gradients as they are.
        schedule: ``planned``, or the constant step size in units of 1/L.
        delta: Largest relative error of a gradient before training.
        seen: Largest relative error of a gradient in this row's runs.
        floor: Squared distance that no step size is certain to undercut.
        error: Mean squared distance in the end.
        bound: What the analysis promises.
        first_step: Step size of the first step.
    """

    bits: int
    schedule: str
    delta: float
    seen: float
    floor: float
    error: float
    bound: float
    first_step: float


def round_rows(values: Tensor, bits: int) -> Tensor:
    """Each row on its own uniform grid; the same as ``round_to_grid`` row by row."""
    if bits == 32:
        return values
    step: Tensor = values.abs().amax(dim=1, keepdim=True) / (2 ** (bits - 1) - 1)
    return (values / step).round() * step


def relative_errors(exact: Tensor, rounded: Tensor) -> Tensor:
    """Length of the error over length of the gradient, row by row."""
    lengths: Tensor = (rounded - exact).norm(dim=1) / exact.norm(dim=1)
    return lengths


@cache
def task() -> Task:
    """Load the data, and find the optimum by Newton's method."""
    data = LogisticDigits(PENALTY)
    noise = float(data.all_gradients(data.optimum).square().sum(dim=1).mean())
    problem = BiasedSGDProblem(m=PENALTY, L=0.25 + PENALTY, G2=noise)
    return Task(data, problem, float(data.optimum.square().sum()))


def measured_error(bits: int) -> float:
    """Largest relative error over all samples, at the start and at the optimum."""
    data = task().data
    exact = torch.cat([data.all_gradients(w) for w in (0 * data.optimum, data.optimum)])
    return float(relative_errors(exact, round_rows(exact, bits)).max())


def planned_steps(delta: float, num_steps: int) -> list[float]:
    """The optimal schedule, as ``BiasedSGDLR`` has it."""
    _, problem, U = task()
    steps = []
    for _ in range(num_steps):
        steps.append(min(optimal_step(problem, U, delta), 0.5 / problem.m21))
        U = biased_sgd_step_bound(problem, steps[-1], U, delta).U_next
        if steps[-1] == 0:
            return steps + [0.0] * (num_steps - len(steps))
    return steps


def simulate(steps: Sequence[float], bits: int) -> tuple[float, float]:
    """Mean squared distance in the end over many runs from zero, and the largest relative error on the way."""
    data = task().data
    rows, optimum = data.rows, data.optimum
    generator = torch.Generator().manual_seed(0)
    w = torch.zeros(NUM_RUNS, len(optimum), dtype=rows.dtype)
    seen = 0.0
    for step in steps:
        exact = data.gradients(w, rows[torch.randint(len(rows), (NUM_RUNS,), generator=generator)])
        rounded = round_rows(exact, bits)
        seen = max(seen, float(relative_errors(exact, rounded).max()))
        w = w - step * rounded
    return float((w - optimum).square().sum(dim=1).mean()), seen


def rows_of(bits: int, num_steps: int) -> list[Row]:
    """Planned and constant steps at so many bits."""
    problem, U0 = task().problem, task().U0
    delta = measured_error(bits)
    schedules = {"planned": planned_steps(delta, num_steps)}
    for share in CONSTANT:
        schedules[f"{share}/L"] = [share / (0.25 + PENALTY)] * num_steps
    found = []
    for name, steps in schedules.items():
        error, seen = simulate(steps, bits)
        bound = biased_sgd_bound(problem, steps, U0, max(delta, seen))[-1]
        floor = biased_sgd_floor(problem, delta)
        found.append(Row(bits, name, delta, seen, floor, error, bound, steps[0]))
    return found


def table_of(bits: Sequence[int], num_steps: int) -> list[Row]:
    """All rows."""
    return [row for number in track(bits, transient=True) for row in rows_of(number, num_steps)]


def as_table(rows: Sequence[Row]) -> Table:
    """One line per number of bits and schedule."""
    table = Table(box=SIMPLE_HEAD, padding=0)
    for header in ("bits", "δ", "floor", "step size", "first step", "error", "bound"):
        table.add_column(header, justify="right", no_wrap=True)
    for row in rows:
        fixed = (str(row.bits), f"{row.delta:.4f}", shown(row.floor))
        numbers = (f"{row.first_step:.3g}", shown(row.error), shown(row.bound))
        table.add_row(
            *(fixed if row.schedule == "planned" else ("", "", "")), row.schedule, *numbers
        )
    return table


def shown(value: float) -> str:
    """Three digits, or a word for no limit."""
    return "none" if math.isinf(value) or value > 1e9 else f"{value:.3g}"


def main() -> None:
    """Simulate, print, keep."""
    parser = arguments(
        "Planned step sizes for gradients of few bits.", None, quick="300 steps, to try the script"
    )
    options = parser.parse_args()
    rows = table_of(BITS, 300 if options.quick else NUM_STEPS)
    table = as_table(rows)
    console = Console(width=120)
    console.print(table)
    console.print(
        f"Budget: relative errors up to δ = {max_relative_error(task().problem, task().U0):.4f}."
    )
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        save_table(options.output / "biased_sgd_bits.md", table)
        numbers = json.dumps([asdict(row) for row in rows], indent=1) + "\n"
        (options.output / "biased_sgd_bits.json").write_text(numbers)


if __name__ == "__main__":
    main()
