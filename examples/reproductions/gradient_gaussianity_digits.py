"""Whether gradient noise is Gaussian, against the batch size and over the training, with a Gaussian control.

An MLP without biases and a small convolutional network on handwritten digits, SGD at a constant step size. At four
points of the training the noise in gradients of different batch sizes is tested on random directions, as in the paper,
and by coordinate. Control: Gaussian noise with the covariance of the measured one, tested in the same way. Written
without Lightning, so that nothing stands between the gradients and the numbers.

    python examples/reproductions/gradient_gaussianity_digits.py
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
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

from lightning_sgd import GaussianitySettings, gradient_gaussianity, shapiro_wilk

if TYPE_CHECKING:
    from pathlib import Path

STEPS, BATCH_SIZES = (0, 200, 1000, 3000), (4, 32, 128, 256, 512)
NUM_GRADIENTS, NUM_DIRECTIONS = 256, 512
LR, TRAINING_BATCH = 0.1, 32
SETTINGS = GaussianitySettings(num_directions=NUM_DIRECTIONS)
INK = (0, 0.02, 0.1, 0.3, 0.7, 1)
COLORS = ("#0072B2", "#56B4E9", "#E69F00", "#D55E00")


@dataclass(frozen=True)
class Row:
    """What was found at one step with one batch size.

    Attributes:
        net: Name of the network.
        step: Steps of training.
        accuracy: On the training data.
        batch_size: Samples per gradient.
        rejected: Share of random directions that the test of Shapiro and Wilk rejects at 5 %.
        limit: What Gaussian noise of this covariance exceeds at a rate of 0.5 %.
        p_value: Calibrated.
        anderson_darling: Share that the test of Anderson and Darling rejects.
        control: As ``rejected``, for Gaussian noise.
        coordinate: Share of coordinates that the test of Shapiro and Wilk rejects.
        coordinate_control: As ``coordinate``, for Gaussian noise.
        mean_w: Mean statistic of Shapiro and Wilk on random directions.
        norm_kurtosis: Excess kurtosis that lengths of the noise give to random directions.
        dimension: Effective dimension.
        verdict: In words.
    """

    net: str
    step: int
    accuracy: float
    batch_size: int
    rejected: float
    limit: float
    p_value: float
    anderson_darling: float
    control: float
    coordinate: float
    coordinate_control: float
    mean_w: float
    norm_kurtosis: float
    dimension: float
    verdict: str


def cnn() -> nn.Sequential:
    """Two convolutions, one linear layer; no batch normalization, whose statistics would depend on the batch size."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(128, 10),
    )


NETS = {"MLP": bias_free_mlp, "CNN": cnn}


def measure(name: str, net: nn.Module, x: Tensor, y: Tensor, step: int) -> Iterator[Row]:
    """One row for each batch size."""
    accuracy = float((net(x).argmax(dim=1) == y).double().mean())
    for size in BATCH_SIZES:
        generator = torch.Generator().manual_seed(size)
        rows = batch_gradients(net, x, y, size=size, num=NUM_GRADIENTS, generator=generator)
        real = gradient_gaussianity(rows, generator, SETTINGS)
        control = gradient_gaussianity(gaussian_like(rows, generator), generator, SETTINGS)
        yield Row(
            net=name,
            step=step,
            accuracy=round(accuracy, 4),
            batch_size=size,
            rejected=round(real.random.rejected, 4),
            limit=round(real.random.limit, 4),
            p_value=round(real.random.p_value, 4),
            anderson_darling=round(real.rejected_anderson_darling, 4),
            control=round(control.random.rejected, 4),
            coordinate=round(real.coordinate.rejected, 4),
            coordinate_control=round(control.coordinate.rejected, 4),
            mean_w=round(real.random.statistic, 4),
            norm_kurtosis=round(real.norm_kurtosis, 4),
            dimension=round(real.effective_dimension, 4),
            verdict=real.verdict,
        )


def by_ink() -> Table:
    """Share of coordinates rejected in the first layer of the untrained MLP, by how many images have ink at a pixel."""
    x, y = load_digits()
    torch.manual_seed(0)
    size = BATCH_SIZES[-1]
    generator = torch.Generator().manual_seed(size)
    net = bias_free_mlp()
    rows = batch_gradients(net, x, y, size=size, num=NUM_GRADIENTS, generator=generator)
    p_values = shapiro_wilk(rows[:, : 64 * 64], dim=0).p_value.view(64, 64)
    ink = (x > 0).double().mean(dim=0)
    table = Table(box=SIMPLE_HEAD, padding=0)
    for header in ("images with ink at the pixel", "pixels", "rejected"):
        table.add_column(header, justify="right")
    for low, high in pairwise(INK):
        found = p_values[:, (ink > low) & (ink <= high)]
        share = float((found[found.isfinite()] < SETTINGS.level).double().mean())
        table.add_row(f"{low:.0%} to {high:.0%}", str(found.shape[1]), f"{share:.0%}")
    return table


def run(name: str, steps: Sequence[int]) -> list[Row]:
    """Train, and measure at these steps."""
    x, y = load_digits()
    torch.manual_seed(0)
    net, num_steps = NETS[name](), max(steps) + 1
    rows: list[Row] = []
    for step in sgd_steps(net, x, y, lr=LR, batch_size=TRAINING_BATCH, num_steps=num_steps):
        if step in steps:
            rows += measure(name, net, x, y, step)
    return rows


def as_table(rows: Sequence[Row]) -> Table:
    """One line each."""
    table = Table(box=SIMPLE_HEAD, padding=0)
    headers = (
        "net",
        "step",
        "accuracy",
        "b",
        "rejected",
        "Gaussian: at most",
        "p",
        "control",
        "by coordinate",
        "control",
        "kurtosis",
        "dimension",
    )
    for header in headers:
        table.add_column(header, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.net,
            str(row.step),
            f"{row.accuracy:.1%}",
            str(row.batch_size),
            f"{row.rejected:.0%}",
            f"{row.limit:.0%}",
            f"{row.p_value:.3f}",
            f"{row.control:.0%}",
            f"{row.coordinate:.0%}",
            f"{row.coordinate_control:.0%}",
            f"{row.norm_kurtosis:.2g}",
            f"{row.dimension:.1f}",
        )
    return table


def draw(path: Path, rows: Sequence[Row]) -> None:
    """Share of directions rejected over the batch size: one line for each step, one panel for each net and family."""
    from matplotlib import pyplot as plt

    families = {"rejected": "on random directions", "coordinate": "by coordinate"}
    with plt.rc_context(svg_style("gradient_gaussianity")):
        figure, panels = plt.subplots(
            1, 4, figsize=(10, 2.8), layout="constrained", sharey=True, sharex=True
        )
        places = [(net, key) for net in NETS for key in families]
        for axes, (net, key) in zip(panels, places, strict=True):
            for step, color in zip(STEPS, COLORS, strict=True):
                found = [row for row in rows if (row.net, row.step) == (net, step)]
                sizes = [row.batch_size for row in found]
                shares = [getattr(row, key) for row in found]
                axes.semilogx(sizes, shares, "o-", color=color, label=f"step {step}", markersize=3)
            axes.axhline(0.05, color="#999999", linewidth=0.8)
            axes.set_xticks(BATCH_SIZES, [str(size) for size in BATCH_SIZES])
            axes.minorticks_off()
            axes.set(title=f"{net}, {families[key]}", xlabel="batch size b", ylim=(0, 1.03))
        panels[0].set_ylabel("share rejected at 5 %")
        handles, names = panels[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside right center", frameon=False)
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)


def main() -> None:
    """Train and test, print the table, keep the numbers and the figure."""
    options = arguments(
        "Gaussianity against the batch size, with control.",
        "gradient_gaussianity_digits",
        quick="the beginning of one net only, no figure",
    ).parse_args()
    torch.set_num_threads(1)  # more threads than one only wait for each other at this size
    names, steps = (["MLP"], STEPS[:1]) if options.quick else (list(NETS), STEPS)
    rows = [row for name in names for row in run(name, steps)]
    table = as_table(rows)
    Console(width=140).print(table)
    options.output.mkdir(parents=True, exist_ok=True)
    numbers = json.dumps([asdict(row) for row in rows], indent=1)
    (options.output / "gradient_gaussianity_digits.json").write_text(numbers + "\n")
    save_table(options.output / "gradient_gaussianity_digits.md", table, 160)
    if not options.quick:
        ink = by_ink()
        Console(width=140).print(ink)
        save_table(options.output / "gradient_gaussianity_ink.md", ink, 160)
        draw(options.output / "gradient_gaussianity_digits.svg", rows)
    print(f"Written to {options.output}")


if __name__ == "__main__":
    main()
