"""Tail index and Gaussianity of gradient noise over width and depth, both statistics from the same gradients.

MLPs without biases on handwritten digits, SGD at a constant step size, as in the sweep of the paper on tail indices. At
three points of each training three numbers are taken from one sample of gradients: the pooled index of the paper, the
index by coordinate, and the share of directions in which the noise is not Gaussian. Written without Lightning, so that
nothing stands between the gradients and the numbers.

    python examples/reproductions/gradient_noise_sweep.py
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise, product
from typing import TYPE_CHECKING

import torch
from _shared import arguments, load_digits, save_table, sgd_steps, svg_style
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lightning_sgd import gradient_gaussianity
from lightning_sgd.functional.noise.gradient_sample import Coordinates, GradientSample
from lightning_sgd.functional.noise.gradient_tail_index import gradient_tail_index

if TYPE_CHECKING:
    from pathlib import Path

WIDTHS, DEPTHS, STEPS = (8, 32, 128, 512), (2, 4, 8), (0, 200, 2000)
LR, BATCH_SIZE = 0.1, 32
NUM_GRADIENTS, NUM_COORDINATES = 128, 65536
COLORS = ("#56B4E9", "#0072B2", "#D55E00")


@dataclass(frozen=True)
class Row:
    """What was measured at one step of one network.

    Attributes:
        width: Units of each hidden layer.
        depth: Number of linear layers.
        step: Steps of training.
        accuracy: On the training data.
        pooled: Tail index of all entries as one sequence, as in the paper.
        coordinate: Tail index by coordinate over batches.
        error: Its standard error.
        rejected: Share of random directions in which noise is not Gaussian, by the test of Shapiro and Wilk at 5 %.
        limit: What Gaussian noise of this covariance exceeds at a rate of 0.5 %.
        coordinate_rejected: Share of coordinates.
        dimension: Effective dimension of the noise.
    """

    width: int
    depth: int
    step: int
    accuracy: float
    pooled: float
    coordinate: float
    error: float
    rejected: float
    limit: float
    coordinate_rejected: float
    dimension: float


def mlp(width: int, depth: int) -> nn.Sequential:
    """Linear layers without biases; He's scale, without which eight layers would not train."""
    sizes = (64, *[width] * (depth - 1), 10)
    layers: list[nn.Module] = []
    for num_in, num_out in pairwise(sizes):
        linear = nn.Linear(num_in, num_out, bias=False)
        nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def gradients(net: nn.Module, x: Tensor, y: Tensor, step: int) -> GradientSample:
    """Of batches drawn with replacement, in a fixed part of the coordinates."""
    generator = torch.Generator().manual_seed(step)
    params = dict(net.named_parameters())
    sizes = {name: param.numel() for name, param in params.items()}
    coordinates, rows = Coordinates(sizes, NUM_COORDINATES, seed=0), []
    for _ in range(NUM_GRADIENTS):
        batch = torch.randint(len(x), (BATCH_SIZE,), generator=generator)
        loss = cross_entropy(net(x[batch]), y[batch])
        rows.append(coordinates.of(torch.autograd.grad(loss, list(params.values()))))
    return GradientSample(torch.stack(rows), BATCH_SIZE, coordinates.layers, step)


def measure(net: nn.Module, x: Tensor, y: Tensor, step: int) -> list[float]:
    """Accuracy, and both statistics of one sample of gradients."""
    accuracy = float((net(x).argmax(dim=1) == y).double().mean())
    sample, generator = gradients(net, x, y, step), torch.Generator().manual_seed(0)
    tails = gradient_tail_index(sample, generator)
    normality = gradient_gaussianity(sample.rows, generator)
    values = (
        accuracy,
        tails.pooled.alpha,
        tails.coordinate.alpha,
        tails.coordinate.standard_error,
        normality.random.rejected,
        normality.random.limit,
        normality.coordinate.rejected,
        normality.effective_dimension,
    )
    return [round(value, 4) for value in values]


def train(width: int, depth: int, steps: Sequence[int]) -> Iterator[Row]:
    """One network, measured at these steps."""
    x, y = load_digits()
    torch.manual_seed(0)
    net = mlp(width, depth)
    num_steps = max(steps) + 1
    for step in sgd_steps(net, x, y, lr=LR, batch_size=BATCH_SIZE, num_steps=num_steps):
        if step in steps:
            yield Row(width, depth, step, *measure(net, x, y, step))


def as_table(rows: Sequence[Row]) -> Table:
    """One line each."""
    table = Table(box=SIMPLE_HEAD, padding=0)
    headers = (
        "depth",
        "width",
        "step",
        "accuracy",
        "α pooled",
        "α by coordinate",
        "rejected",
        "Gaussian: at most",
        "rejected by coordinate",
        "dimension",
    )
    for header in headers:
        table.add_column(header, justify="right", no_wrap=True)
    for row in rows:
        shares = (row.rejected, row.limit, row.coordinate_rejected)
        table.add_row(
            str(row.depth),
            str(row.width),
            str(row.step),
            f"{row.accuracy:.0%}",
            f"{row.pooled:.2f}",
            f"{row.coordinate:.2f} ± {row.error:.2f}",
            *(f"{share:.0%}" for share in shares),
            f"{row.dimension:.1f}",
        )
    return table


def draw(path: Path, rows: Sequence[Row]) -> None:
    """Three statistics, one panel each, over the width: a colour for each step, a line style for each depth."""
    from matplotlib import pyplot as plt

    panels = {
        "pooled": ("tail index, pooled", (0, 3)),
        "coordinate": ("tail index by coordinate", (0, 3)),
        "rejected": ("share of directions rejected", (0, 1.03)),
    }
    styles = dict(zip(DEPTHS, ("-", "--", ":"), strict=True))
    with plt.rc_context(svg_style("gradient_noise")):
        figure, places = plt.subplots(1, 3, figsize=(9, 3), layout="constrained", sharex=True)
        for axes, (key, (title, limits)) in zip(places, panels.items(), strict=True):
            for (step, color), depth in product(zip(STEPS, COLORS, strict=True), DEPTHS):
                found = [row for row in rows if (row.step, row.depth) == (step, depth)]
                line = f"o{styles[depth]}"
                label = f"step {step}" if depth == DEPTHS[0] else None
                values = [getattr(row, key) for row in found]
                widths = [row.width for row in found]
                axes.semilogx(widths, values, line, color=color, label=label, markersize=3)
            axes.axhline(0.05 if key == "rejected" else 2, color="#999999", linewidth=0.8)
            axes.set_xticks(WIDTHS, [str(width) for width in WIDTHS])
            axes.minorticks_off()
            axes.set(title=title, xlabel="width", ylim=limits)
        places[0].legend(fontsize="small", frameon=False, loc="lower right")
        depths = ", ".join(
            f"{depth} {name}"
            for depth, name in zip(DEPTHS, ("solid", "dashed", "dotted"), strict=True)
        )
        places[0].text(
            0.02, 0.97, f"layers: {depths}", transform=places[0].transAxes, va="top", fontsize=7
        )
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)


def main() -> None:
    """Train and measure, print the table, keep the numbers and the figure."""
    options = arguments(
        "Noise of gradients over width and depth.",
        "gradient_noise_sweep",
        quick="one small network, no figure",
    ).parse_args()
    torch.set_num_threads(1)  # more threads than one only wait for each other at this size
    grid = [(2, 8)] if options.quick else list(product(DEPTHS, WIDTHS))
    steps = STEPS[:2] if options.quick else STEPS
    rows = [row for depth, width in grid for row in train(width, depth, steps)]
    table = as_table(rows)
    Console(width=140).print(table)
    options.output.mkdir(parents=True, exist_ok=True)
    numbers = json.dumps([asdict(row) for row in rows], indent=1)
    (options.output / "gradient_noise_sweep.json").write_text(numbers + "\n")
    save_table(options.output / "gradient_noise_sweep.md", table, 160)
    if not options.quick:
        draw(options.output / "gradient_noise_sweep.svg", rows)
    print(f"Written to {options.output}")


if __name__ == "__main__":
    main()
