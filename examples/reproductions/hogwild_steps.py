"""Diminishing against constant step sizes on logistic regression, with and without delayed gradients.

Handwritten digits, "below five" against the rest, squared norm as penalty. One sample moves the weights at a time;
with a delay τ it was taken τ updates ago. All runs of a row are made at once.

    python examples/reproductions/hogwild_steps.py
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from typing import Any

import torch
from _shared import LogisticDigits, arguments, save_table
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table

from lightning_sgd import diminishing_bound
from lightning_sgd.functional.step_size.diminishing import diminishing_steps

PENALTY, CURVATURE = 0.02, 0.27
"""Strong convexity [μ] and, with rows of norm one, smoothness 1/4 + μ of every sample [L]."""
NUM_RUNS = 100
TIMES = (300, 3000, 30_000)
DELAYS = (0, 10, 100)


@dataclass(frozen=True)
class Row:
    """What one schedule did.

    Attributes:
        schedule: Its name.
        delay: Age of a gradient in updates [τ].
        errors: Mean squared distance from the optimum at ``TIMES``.
        bounds: What theorem 2 promises there, if it applies.
    """

    schedule: str
    delay: int
    errors: tuple[float, ...]
    bounds: tuple[float, ...] | None = None


@cache
def problem() -> LogisticDigits:
    """Load the data, and find the optimum, once."""
    return LogisticDigits(PENALTY)


def noise() -> float:
    """Twice the mean squared norm of a gradient at the optimum [N]."""
    at_optimum = problem().all_gradients(problem().optimum)
    return float(2 * at_optimum.square().sum(dim=1).mean())


def simulate(step_size: Callable[[float], float], delay: int, times: Sequence[int]) -> list[float]:
    """Mean squared distance from the optimum at some times, over many runs from zero."""
    rows, optimum = problem().rows, problem().optimum
    generator = torch.Generator().manual_seed(0)
    past = [torch.zeros(NUM_RUNS, len(optimum), dtype=rows.dtype)] * (delay + 1)
    errors = []
    for t in range(max(times) + 1):
        w = past[t % (delay + 1)]
        if t in times:
            errors.append(float((w - optimum).square().sum(dim=1).mean()))
        chosen = torch.randint(len(rows), (NUM_RUNS,), generator=generator)
        read = past[(t + 1) % (delay + 1)]  # the oldest one that is kept
        past[(t + 1) % (delay + 1)] = w - step_size(t) * problem().gradients(read, rows[chosen])
    return errors


def constant(lr: float, _: float) -> float:
    """The same step size at all times."""
    return lr


def schedules(delay: int) -> dict[str, Callable[[float], float]]:
    """Every schedule of the table for one delay."""
    settings: dict[str, Any] = {"mu": PENALTY, "L": CURVATURE}
    delayed = {**settings, "theorem": "hogwild", "max_delay": delay}
    found: dict[str, Callable[[float], float]] = {}
    if delay == 0:
        found["theorem 2: 2/(μ(t + E))"] = diminishing_steps(**settings).at
    found["theorem 5, smooth"] = diminishing_steps(**delayed).at
    found["theorem 5, doubling"] = diminishing_steps(**delayed, form="doubling").at
    for share in (0.5, 0.05, 0.005):
        found[f"constant {share}/L"] = partial(constant, share / CURVATURE)
    return found


def table_of(delays: Sequence[int], times: Sequence[int]) -> list[Row]:
    """Simulate every schedule at every delay."""
    distance = float(problem().optimum.square().sum())
    found = []
    for delay in delays:
        for name, steps in track(schedules(delay).items(), transient=True):
            bounds = None
            if name.startswith("theorem 2"):
                settings = (PENALTY, CURVATURE, noise(), distance)
                bounds = tuple(diminishing_bound(t, *settings) for t in times)
            found.append(Row(name, delay, tuple(simulate(steps, delay, times)), bounds))
    return found


def as_table(rows: Sequence[Row], times: Sequence[int]) -> Table:
    """One line per schedule and delay."""
    table = Table(box=SIMPLE_HEAD, padding=0)
    for header in ("τ", "schedule", *(f"t = {t}" for t in times)):
        table.add_column(header, justify="left" if header == "schedule" else "right", no_wrap=True)
    for row in rows:
        table.add_row(str(row.delay), row.schedule, *(f"{error:.3g}" for error in row.errors))
        if row.bounds is not None:
            cells = ("–" if bound == float("inf") else f"{bound:.3g}" for bound in row.bounds)
            table.add_row("", "bound of theorem 2", *cells)
    return table


def main() -> None:
    """Simulate, print, keep."""
    parser = arguments(
        "Diminishing against constant step sizes.", None, quick="300 steps, to try the script"
    )
    options = parser.parse_args()
    times = TIMES[:1] if options.quick else TIMES
    rows = table_of(DELAYS, times)
    table = as_table(rows, times)
    Console(width=120).print(table)
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        save_table(options.output / "hogwild_steps.md", table)
        numbers = json.dumps([asdict(row) for row in rows], indent=1) + "\n"
        (options.output / "hogwild_steps.json").write_text(numbers)


if __name__ == "__main__":
    main()
