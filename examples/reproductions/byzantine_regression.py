"""Robust rules under the worst attacks of their kind: how fast they converge, and how far they are from the mean.

All workers live in one process as the rows of a matrix. First linear regression with 30 workers of which 9 send, in
every step, whatever moves the rule farthest; then a single estimate in ten thousand dimensions.

    python examples/reproductions/byzantine_regression.py
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from statistics import fmean

import torch
from _shared import arguments, save_table
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from lightning_sgd import ALIE, get_aggregator

NUM_FEATURES, NUM_WORKERS, NUM_FAULTY, LR = 50, 30, 9, 0.5
RULES = ("mean", "krum", "trmean", "median", "geomed", "filter")
FACTORS = (0.0, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0)
STEPS = (1, 10, 20, 40, 60)
BATCH_SIZES = (16, 64, 256)

LENGTH, NUM_ESTIMATES = 10_000, 5
STRENGTHS = (0.5, 1.5, 10.0)


@dataclass(frozen=True)
class Curve:
    """Distance of the model from the solution after every step.

    Attributes:
        rule: Name of the rule; ``"honest mean"`` if nobody is faulty.
        batch_size: Samples per worker and step.
        distances: After steps 1, 2, ….
    """

    rule: str
    batch_size: int
    distances: list[float]


@dataclass(frozen=True)
class Estimate:
    """Error of one rule, relative to the standard error of the mean of the honest rows.

    Attributes:
        rule: Name of the rule.
        strength: How many standard deviations the faulty rows are off.
        error: Mean over the draws.
    """

    rule: str
    strength: float
    error: float


def worst_rows(rule: str, honest: Tensor) -> Tensor:
    """All rows, the faulty ones where they move the rule farthest, along −sign(μ)·σ or −μ, by one of the factors."""
    mean, sigma = honest.mean(dim=0), honest.std(dim=0)
    aggregator, worst, found = get_aggregator(rule, NUM_FAULTY), -1.0, honest
    for direction in (-mean.sign() * sigma, -mean):
        for factor in FACTORS:
            sent = (mean + factor * direction).expand(NUM_FAULTY, -1)
            rows = torch.cat([honest, sent])
            error = float((aggregator(rows) - mean).norm())
            if error > worst:
                worst, found = error, rows
    return found


def regress(rule: str, batch_size: int, num_steps: int, seed: int = 0) -> Curve:
    """SGD on fresh samples of a linear model with noise of standard deviation 0.5, from zero."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randn(NUM_FEATURES, generator=generator, dtype=torch.float64)
    w, distances = torch.zeros_like(truth), []
    for _ in range(num_steps):
        shape = (NUM_WORKERS - NUM_FAULTY, batch_size, NUM_FEATURES)
        a = torch.randn(shape, generator=generator, dtype=torch.float64)
        noise = 0.5 * torch.randn(shape[:2], generator=generator, dtype=torch.float64)
        residuals = a @ (w - truth) - noise
        honest = (a * residuals[..., None]).mean(dim=1)
        if rule == "honest mean":
            step = honest.mean(dim=0)
        else:
            step = get_aggregator(rule, NUM_FAULTY)(worst_rows(rule, honest))
        w = w - LR * step
        distances.append(float(f"{float((w - truth).norm()):.4g}"))
        if distances[-1] > 1e12:
            break
    return Curve(rule, batch_size, distances)


def floor(curve: Curve) -> float:
    """Mean distance over the last third of the steps."""
    return fmean(curve.distances[-len(curve.distances) // 3 :])


def estimates(seed: int = 0) -> list[Estimate]:
    """Errors for 16 honest rows of noise and 4 that are off by the same in every coordinate."""
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randn(NUM_ESTIMATES, 16, LENGTH, generator=generator)
    found = []
    for rule in RULES:
        for strength in STRENGTHS:
            errors = [_error(rule, honest, strength, generator) for honest in draws]
            found.append(Estimate(rule, strength, float(f"{fmean(errors):.3g}")))
    return found


def _error(rule: str, honest: Tensor, strength: float, generator: torch.Generator) -> float:
    own = honest.new_zeros(4, LENGTH)
    rows = torch.cat([honest, ALIE(strength, sign=1)(honest, own, generator)])
    error = (get_aggregator(rule, 4)(rows) - honest.mean(dim=0)).norm()
    return float(error) / math.sqrt(LENGTH / 16)


def regression_table(curves: list[Curve]) -> Table:
    """Distances at some steps."""
    table = Table()
    for header in ("rule", *(f"step {step}" for step in STEPS)):
        table.add_column(header, justify="left" if header == "rule" else "right", no_wrap=True)
    for curve in curves:
        if curve.batch_size == BATCH_SIZES[0]:
            cells = (_cell(curve.distances, step) for step in STEPS)
            table.add_row(curve.rule, *cells)
    return table


def _cell(distances: list[float], step: int) -> str:
    return f"{distances[step - 1]:.3g}" if step <= len(distances) else "> 1e12"


def estimates_table(found: list[Estimate]) -> Table:
    """One row per rule."""
    table = Table()
    for header in ("rule", *(f"z = {strength:g}" for strength in STRENGTHS)):
        table.add_column(header, justify="left" if header == "rule" else "right", no_wrap=True)
    for rule in RULES:
        table.add_row(rule, *(f"{e.error:.2f}" for e in found if e.rule == rule))
    return table


def main() -> None:
    """Run both, print the tables, keep the numbers."""
    options = arguments(
        "Robust rules under the worst attacks.", "byzantine", quick="five steps, one batch size"
    ).parse_args()
    torch.set_num_threads(1)  # more threads than one only wait for each other at this size
    num_steps = 5 if options.quick else STEPS[-1]
    runs = [(rule, BATCH_SIZES[0]) for rule in ("honest mean", *RULES)]
    runs += [("filter", b) for b in BATCH_SIZES[1:]]
    curves = [regress(rule, b, num_steps) for rule, b in track(runs, transient=True)]
    found = estimates()
    options.output.mkdir(parents=True, exist_ok=True)
    record = {"regression": [asdict(c) for c in curves], "estimates": [asdict(e) for e in found]}
    (options.output / "byzantine_regression.json").write_text(json.dumps(record) + "\n")
    tables = {"regression": regression_table(curves), "estimates": estimates_table(found)}
    for name, table in tables.items():
        Console(width=140).print(table)
        save_table(options.output / f"byzantine_{name}.md", table, 140)
    floors = {c.batch_size: f"{floor(c):.3g}" for c in curves if c.rule == "filter"}
    print(f"Floor of the filter by batch size: {floors}\nWritten to {options.output}")


if __name__ == "__main__":
    main()
