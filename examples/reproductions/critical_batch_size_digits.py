"""Does the noise scale predict how many steps a batch size takes? And where does a larger batch stop paying?

An MLP on handwritten digits is trained to one training loss with many batch sizes, each with its best step size from a
grid, and the steps are compared with what the noise scale of a single run predicts, steps(∞)·(1 + scale/B). Control:
steps that fall like 1/B. The second table is the paper's problem, Gaussian least squares with the eigenvalues 1/k, by
the exact recursion of the covariance of the iterates: equal numbers of samples, at half of the largest step.

    python examples/reproductions/critical_batch_size_digits.py
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from _shared import arguments, load_digits, save_table, svg_style
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import cross_entropy

from lightning_sgd import critical_batch_size, max_learning_rate
from lightning_sgd.functional.noise.noise_scale import (
    NoiseScale,
    gradient_noise,
    noise_scale,
    total_noise,
)
from lightning_sgd.functional.step_size.least_squares import constants_of_moments

if TYPE_CHECKING:
    from pathlib import Path

SIZES, TARGET = (64, 64, 64, 10), 0.2
BATCH_SIZES = (4, 8, 16, 32, 64, 128, 256, 512, 1024)
LRS = tuple(0.02 * 2 ** (k / 2) for k in range(14))
NUM_SEEDS, MEASURED_AT = 5, 32
SPECTRUM_BATCHES, NUM_SAMPLES = (1, 3, 8, 11, 22, 50), 10_000
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#555555"


@dataclass(frozen=True)
class Row:
    """One batch size.

    Attributes:
        batch_size: Samples of a step.
        lr: Best step size.
        steps: Steps to the target with it, mean over seeds.
        error: Standard error of that.
        predicted: By the noise scale, from the steps of the batch size where it was measured.
        linear: As if steps fell like 1/B, from the same.
    """

    batch_size: int
    lr: float
    steps: float
    error: float
    predicted: float
    linear: float


@dataclass(frozen=True)
class Recursion:
    """One batch size on Gaussian least squares.

    Attributes:
        batch_size: Samples of a step.
        lr: Half of the largest step.
        steps: For all samples.
        tail: Excess risk of the mean of the second half of the iterates.
        last: Excess risk of the last iterate.
    """

    batch_size: int
    lr: float
    steps: int
    tail: float
    last: float


def weights(num_lrs: int, num_seeds: int) -> list[Tensor]:
    """Of one network for each step size and seed, equal for equal seeds; shape (runs, in, out)."""
    generator = torch.Generator().manual_seed(0)
    layers = [
        torch.randn(num_seeds, a, b, generator=generator) * math.sqrt(2 / a)
        for a, b in pairwise(SIZES)
    ]
    return [layer.repeat(num_lrs, 1, 1).requires_grad_() for layer in layers]


def losses(layers: Sequence[Tensor], x: Tensor, y: Tensor) -> Tensor:
    """The loss of each network on its own batch, shape (runs,)."""
    for layer in layers[:-1]:
        x = torch.bmm(x, layer).relu()
    scores = torch.bmm(x, layers[-1])
    return cross_entropy(scores.transpose(1, 2), y, reduction="none").mean(dim=1)


def steps_to_target(
    x: Tensor, y: Tensor, batch_size: int, lrs: Sequence[float], num_seeds: int, max_steps: int
) -> Tensor:
    """Steps until the loss on all data is below the target, shape (step sizes, seeds); infinite if never."""
    layers = weights(len(lrs), num_seeds)
    runs = len(lrs) * num_seeds
    rates = torch.tensor(lrs).repeat_interleave(num_seeds)[:, None, None]
    generator = torch.Generator().manual_seed(batch_size)
    found, next_check = torch.full((runs,), math.inf), 1
    for step in range(1, max_steps + 1):
        draw = torch.randint(len(x), (num_seeds, batch_size), generator=generator)
        draw = draw.repeat(len(lrs), 1)  # the same batches for all step sizes
        gradients = torch.autograd.grad(losses(layers, x[draw], y[draw]).sum(), layers)
        with torch.no_grad():
            for layer, gradient in zip(layers, gradients, strict=True):
                layer.sub_(rates * gradient)
            if step == next_check:
                next_check += max(1, step // 40)
                everything = x.expand(runs, -1, -1), y.expand(runs, -1)
                reached = (losses(layers, *everything) < TARGET) & found.isinf()
                found[reached] = step
                # A step size that is slower than another one with all seeds is done.
                if (
                    found.view(-1, num_seeds).isfinite().all(dim=1).any()
                    and step > 1.5 * found.min()
                ):
                    break
    return found.view(len(lrs), num_seeds)


def measured_scale(x: Tensor, y: Tensor, lr: float, num_steps: int) -> NoiseScale:
    """The noise scale of one run with the batch size of the measurement, looks evenly over its steps."""
    layers, looks = weights(1, 1), []
    generator = torch.Generator().manual_seed(0)
    for step in range(num_steps):
        if step % max(1, num_steps // 20) == 0:
            rows = []
            for _ in range(32):
                draw = torch.randint(len(x), (1, MEASURED_AT), generator=generator)
                parts = torch.autograd.grad(losses(layers, x[draw], y[draw]).sum(), layers)
                rows.append(torch.cat([part.flatten() for part in parts]))
            looks.append(gradient_noise(torch.stack(rows), MEASURED_AT))
        draw = torch.randint(len(x), (1, MEASURED_AT), generator=generator)
        gradients = torch.autograd.grad(losses(layers, x[draw], y[draw]).sum(), layers)
        with torch.no_grad():
            for layer, gradient in zip(layers, gradients, strict=True):
                layer.sub_(lr * gradient)
    return noise_scale(total_noise(looks))


def run_digits(
    batch_sizes: Sequence[int], lrs: Sequence[float], num_seeds: int
) -> tuple[list[Row], NoiseScale]:
    """Train with all batch sizes, and measure in one run."""
    x, y = load_digits()
    best = {}
    for size in batch_sizes:
        max_steps = min(12_000, 200 + 40_000 // size)
        found = steps_to_target(x, y, size, lrs, num_seeds, max_steps)
        place = int(found.mean(dim=1).argmin())
        best[size] = lrs[place], found[place]
    lr, steps = best[MEASURED_AT]
    scale, reference = measured_scale(x, y, lr, int(steps.mean())), float(steps.mean())
    rows = []
    for size, (lr, steps) in best.items():
        error = float(steps.std(correction=min(1, num_seeds - 1))) / math.sqrt(num_seeds)
        predicted = reference * (1 + scale.value / size) / (1 + scale.value / MEASURED_AT)
        linear = reference * MEASURED_AT / size
        values = (lr, float(steps.mean()), error, predicted, linear)
        rows.append(Row(size, *(round(value, 3) for value in values)))
    return rows, scale


def fitted_scale(rows: Sequence[Row]) -> float:
    """The scale with which steps(∞)·(1 + scale/B) fits best, in logarithms: what a sweep over batch sizes finds."""
    scales = torch.logspace(-1, 4, 2001, dtype=torch.float64)
    sizes = torch.tensor([row.batch_size for row in rows], dtype=torch.float64)
    steps = torch.tensor([row.steps for row in rows], dtype=torch.float64)
    gaps = steps.log() - (1 + scales[:, None] / sizes).log()
    return float(scales[gaps.var(dim=1).argmin()])


def run_recursion() -> tuple[list[Recursion], float]:
    """The paper's problem: eigenvalues 1/k, noise of variance 0.01, start at 1 in all coordinates."""
    h = 1 / torch.arange(1.0, 51.0, dtype=torch.float64)
    full = torch.diag(h)
    constants = constants_of_moments(full, h.sum() * full + 2 * full @ full, 0.01 * full)
    rows = []
    for b in SPECTRUM_BATCHES:
        lr, steps = max_learning_rate(constants, b) / 2, NUM_SAMPLES // b
        phi, tail, q = torch.ones_like(h), torch.zeros_like(h), 1 - lr * h
        for step in range(1, steps + 1):
            phi = (1 - 2 * lr * h + lr**2 * (b + 1) / b * h**2) * phi + lr**2 / b * h * (
                h @ phi + 0.01
            )
            if step > steps // 2:
                tail += phi * (1 + 2 * q * (1 - q ** (steps - step)) / (lr * h))
        mean = float(h @ tail) / 2 / (steps - steps // 2) ** 2
        rows.append(Recursion(b, round(lr, 5), steps, mean, float(h @ phi) / 2))
    return rows, critical_batch_size(constants)


def digits_table(rows: Sequence[Row]) -> Table:
    """One line each."""
    table = Table(box=SIMPLE_HEAD, padding=0)
    for header in (
        "B",
        "best lr",
        "steps",
        "by the noise scale",
        "if they fell like 1/B",
        "samples",
    ):
        table.add_column(header, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            str(row.batch_size),
            f"{row.lr:.3g}",
            f"{row.steps:.0f} ± {row.error:.0f}",
            f"{row.predicted:.0f}",
            f"{row.linear:.0f}",
            f"{row.steps * row.batch_size:.0f}",
        )
    return table


def recursion_table(rows: Sequence[Recursion]) -> Table:
    """One line each."""
    table = Table(box=SIMPLE_HEAD, padding=0)
    for header in ("b", "γ_max(b)/2", "steps", "mean of the second half", "last iterate"):
        table.add_column(header, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            str(row.batch_size),
            f"{row.lr:.5f}",
            str(row.steps),
            f"{row.tail:.3e}",
            f"{row.last:.3e}",
        )
    return table


def draw(path: Path, rows: Sequence[Row], scale: NoiseScale) -> None:
    """Steps over the batch size, with both predictions."""
    from matplotlib import pyplot as plt

    sizes = [row.batch_size for row in rows]
    with plt.rc_context(svg_style("critical")):
        figure, axes = plt.subplots(figsize=(5.5, 3.2), layout="constrained")
        axes.errorbar(
            sizes,
            [row.steps for row in rows],
            [2 * row.error for row in rows],
            fmt="o",
            color=BLUE,
            label="best step size of the grid",
        )
        axes.plot(sizes, [row.predicted for row in rows], color=ORANGE, label="by the noise scale")
        axes.plot(
            sizes, [row.linear for row in rows], ":", color=GREY, label="if they fell like 1/B"
        )
        axes.axvspan(scale.low, scale.high, color=ORANGE, alpha=0.15, label="noise scale")
        axes.set(xscale="log", yscale="log", xlabel="batch size", ylabel="steps to the target")
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.minorticks_off()
        axes.legend(fontsize="small", frameon=False)
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)


def main() -> None:
    """Train and measure, print the tables, keep the numbers and the figure."""
    options = arguments(
        "Steps against the batch size, with predictions.",
        "critical_batch_size_digits",
        quick="two batch sizes, no figure",
    ).parse_args()
    torch.set_num_threads(1)  # more threads than one only wait for each other at this size
    choice = ((32, 256), LRS[4:10:2], 1) if options.quick else (BATCH_SIZES, LRS, NUM_SEEDS)
    rows, scale = run_digits(*choice)
    exact, threshold = run_recursion()
    console = Console(width=120)
    console.print(digits_table(rows))
    fitted = fitted_scale(rows)
    interval = f"({scale.low:.1f} to {scale.high:.1f})"
    console.print(f"noise scale {scale.value:.1f} {interval}, fitted to the steps {fitted:.1f}")
    console.print(recursion_table(exact))
    console.print(f"critical batch size {threshold:.2f}")
    options.output.mkdir(parents=True, exist_ok=True)
    numbers = {
        "noise_scale": asdict(scale),
        "fitted_scale": fitted,
        "digits": [asdict(row) for row in rows],
        "critical_batch_size": threshold,
        "recursion": [asdict(row) for row in exact],
    }
    stem = options.output / "critical_batch_size_digits"
    stem.with_suffix(".json").write_text(json.dumps(numbers, indent=1) + "\n")
    save_table(stem.with_suffix(".md"), digits_table(rows))
    save_table(options.output / "critical_batch_size_recursion.md", recursion_table(exact))
    if not options.quick:
        draw(stem.with_suffix(".svg"), rows, scale)
    print(f"Written to {options.output}")


if __name__ == "__main__":
    main()
