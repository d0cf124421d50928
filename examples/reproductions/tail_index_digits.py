"""Tail index of gradient noise against the batch size, with the controls that say what the number is worth.

An MLP without biases on handwritten digits, SGD at a constant step size, as in the paper's small experiments. At three
points of the training the noise in gradients of different batch sizes is measured by coordinate and pooled as in the
paper. Two controls: the same entries in random order, and Gaussian noise with the covariance of the measured one, whose
true index is 2. Written without Lightning, so that nothing stands between the gradients and the numbers.

    python examples/reproductions/tail_index_digits.py
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch
from _shared import (
    arguments,
    batch_gradients,
    bias_free_mlp,
    gaussian_like,
    load_digits,
    save_table,
    sgd_steps,
    svg_style,
)
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from lightning_sgd.functional.noise.gradient_sample import GradientSample
from lightning_sgd.functional.noise.gradient_tail_index import gradient_tail_index

if TYPE_CHECKING:
    from pathlib import Path

SIZES = (64, 64, 64, 10)
STEPS, BATCH_SIZES, NUM_BATCHES = (0, 200, 3000), (4, 32, 128, 500), 64
LR, TRAINING_BATCH = 0.1, 32
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#555555"
SERIES = {
    "coordinate": ("by coordinate", BLUE, "o-"),
    "pooled": ("pooled, as in the paper", ORANGE, "s--"),
    "control": ("pooled, Gaussian noise", GREY, "^:"),
}


@dataclass(frozen=True)
class Row:
    """What was measured at one step with one batch size.

    Attributes:
        step: Steps of training.
        batch_size: Samples per gradient.
        pooled: The paper's estimator for all entries, batch after batch.
        shuffled: The same entries in random order.
        control: As ``pooled``, for Gaussian noise of the same covariance.
        coordinate: By coordinate over batches.
        error: Standard error of ``coordinate``.
        control_coordinate: As ``coordinate``, for the Gaussian noise.
        zeros: Share of entries that are zero.
    """

    step: int
    batch_size: int
    pooled: float
    shuffled: float
    control: float
    coordinate: float
    error: float
    control_coordinate: float
    zeros: float


def measure(net: nn.Module, x: Tensor, y: Tensor, step: int) -> Iterator[Row]:
    """One row for each batch size."""
    for size in BATCH_SIZES:
        generator = torch.Generator().manual_seed(size)
        rows = batch_gradients(net, x, y, size=size, num=NUM_BATCHES, generator=generator)
        real = gradient_tail_index(GradientSample(rows, size, {}, step), generator)
        other = GradientSample(gaussian_like(rows, generator), size, {}, step)
        control = gradient_tail_index(other, generator)
        values = (
            real.pooled.alpha,
            real.pooled_shuffled,
            control.pooled.alpha,
            real.coordinate.alpha,
            real.coordinate.standard_error,
            control.coordinate.alpha,
            real.coordinate.zero_fraction,
        )
        yield Row(step, size, *(round(value, 3) for value in values))


def run(steps: Sequence[int]) -> list[Row]:
    """Train, and measure at these steps."""
    x, y = load_digits()
    torch.manual_seed(0)
    net, num_steps = bias_free_mlp(), max(steps) + 1
    rows: list[Row] = []
    for step in sgd_steps(net, x, y, lr=LR, batch_size=TRAINING_BATCH, num_steps=num_steps):
        if step in steps:
            rows += measure(net, x, y, step)
    return rows


def as_table(rows: Sequence[Row]) -> Table:
    """One line each."""
    table = Table(box=SIMPLE_HEAD, padding=0)
    headers = (
        "step",
        "b",
        "pooled",
        "shuffled",
        "pooled, Gaussian",
        "coordinate",
        "coordinate, Gaussian",
        "zeros",
    )
    for header in headers:
        table.add_column(header, justify="right", no_wrap=True)
    for row in rows:
        indices = (row.pooled, row.shuffled, row.control)
        table.add_row(
            str(row.step),
            str(row.batch_size),
            *(f"{value:.2f}" for value in indices),
            f"{row.coordinate:.2f} ± {row.error:.2f}",
            f"{row.control_coordinate:.2f}",
            f"{row.zeros:.0%}",
        )
    return table


def draw(path: Path, rows: Sequence[Row]) -> None:
    """One panel for each step: indices over the batch size."""
    from matplotlib import pyplot as plt

    steps = sorted({row.step for row in rows})
    with plt.rc_context(svg_style("tail_index")):
        figure, panels = plt.subplots(
            1, len(steps), figsize=(9, 3), layout="constrained", sharey=True
        )
        for axes, step in zip(panels, steps, strict=True):
            found = [row for row in rows if row.step == step]
            for key, (name, color, line) in SERIES.items():
                values = [getattr(row, key) for row in found]
                axes.semilogx(
                    [row.batch_size for row in found], values, line, color=color, label=name
                )
            axes.axhline(2, color="#999999", linewidth=0.8)
            axes.set_xticks(BATCH_SIZES, [str(size) for size in BATCH_SIZES])
            axes.minorticks_off()
            axes.set(title=f"after {step} steps", xlabel="batch size b", ylim=(0, 2.5))
        panels[0].set_ylabel("tail index α")
        panels[0].legend(fontsize="small", loc="lower right", frameon=False)
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)


def main() -> None:
    """Train and measure, print the table, keep the numbers and the figure."""
    options = arguments(
        "Tail index against the batch size, with controls.",
        "tail_index_digits",
        quick="the beginning only, no figure",
    ).parse_args()
    torch.set_num_threads(1)  # more threads than one only wait for each other at this size
    rows = run(STEPS[:1] if options.quick else STEPS)
    table = as_table(rows)
    Console(width=120).print(table)
    options.output.mkdir(parents=True, exist_ok=True)
    numbers = json.dumps([asdict(row) for row in rows], indent=1)
    (options.output / "tail_index_digits.json").write_text(numbers + "\n")
    save_table(options.output / "tail_index_digits.md", table)
    if not options.quick:
        draw(options.output / "tail_index_digits.svg", rows)
    print(f"Written to {options.output}")


if __name__ == "__main__":
    main()
