"""MaSS beside SGD, Nesterov SGD and Adam on handwritten digits, at several step sizes, three seeds each.

Written without Lightning, so that nothing stands between the optimizers and the numbers.

    python examples/reproductions/mass_digits.py
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from statistics import fmean
from typing import TYPE_CHECKING

import torch
from _shared import arguments, save_table, split_digits, svg_style
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, Adam, Optimizer

from lightning_sgd import MaSS

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes

ALPHA = 0.05
GAMMA = (1 - ALPHA) / (1 + ALPHA)  # the same acceleration for Nesterov SGD: 0.9048
STEP_SIZES = (0.03, 0.1, 0.15, 0.2, 0.3, 0.4)
ADAM_STEP_SIZE = 1e-3
BATCH_SIZE = 16

METHODS: dict[str, Callable[[list[Tensor], float], Optimizer]] = {
    "SGD": SGD,
    "Nesterov": lambda params, lr: SGD(params, lr, momentum=GAMMA, nesterov=True),
    "MaSS, κ̃ = 2": lambda params, lr: MaSS(params, lr, ALPHA, kappa_tilde=2),
    "MaSS, κ̃ = 12": lambda params, lr: MaSS(params, lr, ALPHA, kappa_tilde=12),
    "Adam": Adam,
}
SGD_METHODS = tuple(method for method in METHODS if method != "Adam")
STYLES = {
    "SGD": ("#555555", ":"),
    "Nesterov": ("#D55E00", "--"),
    "MaSS, κ̃ = 2": ("#0072B2", "-"),
    "MaSS, κ̃ = 12": ("#56B4E9", "-"),
    "Adam": ("#009E73", "-."),
}


@dataclass(frozen=True)
class Run:
    """What one training run showed.

    Attributes:
        method: Key of ``METHODS``.
        lr: Step size.
        seed: Seed of the weights and of the order of the samples.
        losses: Mean loss over the training set after each epoch.
        accuracy: Share of the test set that is classified correctly after the last epoch.
    """

    method: str
    lr: float
    seed: int
    losses: list[float]
    accuracy: float


def train(
    method: str, lr: float, seed: int, num_epochs: int = 20, *, keep_last: bool = False
) -> Run:
    """Train a network with one hidden layer at a constant step size.

    The last batch of an epoch has a single image, and a gradient far noisier than the others; by default it is dropped.
    """
    (x, y), (test_x, test_y) = split_digits()
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = METHODS[method](list(model.parameters()), lr)
    num_images = len(x) if keep_last else len(x) - len(x) % BATCH_SIZE
    losses = []
    for _ in range(num_epochs):
        for batch in torch.randperm(len(x))[:num_images].split(BATCH_SIZE):
            optimizer.zero_grad()
            cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
        with torch.no_grad():
            loss = float(cross_entropy(model(x), y))
            losses.append(float(f"{loss:.4g}"))
    with torch.no_grad():
        accuracy = float((model(test_x).argmax(dim=1) == test_y).double().mean())
    return Run(method, lr, seed, losses, accuracy)


def train_all(quick: bool, num_seeds: int, keep_last: bool) -> list[Run]:
    """Every method at every step size with every seed; in a hurry at one step size and for eight epochs."""
    step_sizes = (0.3,) if quick else STEP_SIZES
    settings = [(method, lr) for lr, method in product(step_sizes, SGD_METHODS)]
    settings.append(("Adam", ADAM_STEP_SIZE))
    return [
        train(method, lr, seed, num_epochs=8 if quick else 20, keep_last=keep_last)
        for (method, lr), seed in track(list(product(settings, range(num_seeds))), transient=True)
    ]


def final(runs: Sequence[Run], method: str, lr: float) -> tuple[list[float], float]:
    """Final losses of all seeds, and their mean test accuracy."""
    found = [run for run in runs if (run.method, run.lr) == (method, lr)]
    return [run.losses[-1] for run in found], fmean(run.accuracy for run in found)


def as_table(runs: Sequence[Run]) -> Table:
    """Mean final training loss and test accuracy, the lowest loss of each step size in bold."""
    losses, accuracy = final(runs, "Adam", ADAM_STEP_SIZE)
    adam = f"Adam, lr {ADAM_STEP_SIZE}: {fmean(losses):.1e} ({100 * accuracy:.1f})"
    title = "Training loss (test accuracy in %)"
    table = Table(title=title, caption=adam, title_justify="left", caption_justify="left")
    for header in ("lr", *SGD_METHODS):
        table.add_column(header, justify="right", no_wrap=True)
    for lr in sorted({run.lr for run in runs if run.method != "Adam"}):
        found = [final(runs, method, lr) for method in SGD_METHODS]
        best = min(fmean(losses) for losses, _ in found)
        cells = (
            f"[{'bold' if fmean(losses) == best else 'default'}]{fmean(losses):.1e} ({100 * accuracy:.1f})"
            for losses, accuracy in found
        )
        table.add_row(f"{lr:g}", *cells)
    return table


def draw_step_sizes(axes: Axes, runs: Sequence[Run]) -> None:
    """Final loss against step size: the mean over the seeds in the range of the seeds."""
    for method in SGD_METHODS:
        losses = [final(runs, method, lr)[0] for lr in STEP_SIZES]
        color, line = STYLES[method]
        axes.fill_between(
            STEP_SIZES, list(map(min, losses)), list(map(max, losses)), color=color, alpha=0.15
        )
        axes.loglog(STEP_SIZES, list(map(fmean, losses)), line, color=color, marker=".")
    axes.axhline(
        fmean(final(runs, "Adam", ADAM_STEP_SIZE)[0]),
        color=STYLES["Adam"][0],
        linestyle=STYLES["Adam"][1],
    )
    axes.set(title="After 20 epochs", xlabel="step size", ylabel="training loss")
    axes.set_xticks(STEP_SIZES, [f"{lr:g}" for lr in STEP_SIZES])
    axes.minorticks_off()


def draw_epochs(axes: Axes, runs: Sequence[Run], lr: float) -> None:
    """Loss against epoch at one step size, every seed."""
    for run in runs:
        if run.lr == lr or run.method == "Adam":
            color, line = STYLES[run.method]
            label = run.method if run.seed == 0 else None
            epochs = range(1, len(run.losses) + 1)
            axes.semilogy(epochs, run.losses, line, color=color, linewidth=1, label=label)
    axes.set(title=f"At step size {lr:g} (Adam: {ADAM_STEP_SIZE:g})", xlabel="epoch")
    axes.set_xticks(range(0, 21, 5))


def draw(path: Path, runs: Sequence[Run]) -> None:
    """Two panels in one file."""
    from matplotlib import pyplot as plt

    with plt.rc_context(svg_style("mass")):
        figure, (left, right) = plt.subplots(
            1, 2, figsize=(9, 3.4), layout="constrained", sharey=True
        )
        draw_step_sizes(left, runs)
        draw_epochs(right, runs, lr=0.3)
        figure.legend(*right.get_legend_handles_labels(), loc="outside right center", frameon=False)
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)


def main() -> None:
    """Train, print the table, keep the numbers and the figure."""
    parser = arguments(
        "MaSS beside its peers on handwritten digits.",
        "mass_digits",
        quick="one step size, eight epochs, no figure",
        seeds=3,
    )
    parser.add_argument("--keep_last", action="store_true", help="keep the batch of one image")
    options = parser.parse_args()
    torch.set_num_threads(1)  # more threads than one only wait for each other at this size
    runs = train_all(options.quick, options.seeds, options.keep_last)
    table = as_table(runs)
    Console().print(table)
    options.output.mkdir(parents=True, exist_ok=True)
    numbers = json.dumps([asdict(run) for run in runs])
    (options.output / "mass_digits.json").write_text(numbers + "\n")
    save_table(options.output / "mass_digits.md", table)
    if not options.quick:
        draw(options.output / "mass_digits.svg", runs)
    print(f"Written to {options.output}")


if __name__ == "__main__":
    main()
