"""NovoGrad beside AdamW and SGD with momentum on handwritten digits: step sizes, batch sizes, scales of the loss.

Every method gets the whole range of step sizes at every batch size, so that each is also seen at its best. Written
without Lightning, so that nothing stands between the optimizers and the numbers.

    python examples/reproductions/novograd_digits.py
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
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
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import PolynomialLR

from lightning_sgd import NovoGrad

if TYPE_CHECKING:
    from pathlib import Path

STEP_SIZES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
EPOCHS = {64: 15, 256: 30, 1297: 30}
LOSS_SCALE = 1e4
METHODS: dict[str, Callable[[list[Tensor], float], Optimizer]] = {
    "NovoGrad": lambda params, lr: NovoGrad(params, lr, weight_decay=1e-3),
    "AdamW": AdamW,
    "SGD, momentum 0.9": lambda params, lr: SGD(params, lr, momentum=0.9),
}
STYLES = {"NovoGrad": "#0072B2", "AdamW": "#009E73", "SGD, momentum 0.9": "#D55E00"}


@dataclass(frozen=True)
class Setting:
    """What distinguishes one training from another.

    Attributes:
        method: Key of ``METHODS``.
        lr: First step size; it falls with the square of the remaining time.
        batch_size: Images per step.
        loss_scale: What the loss is multiplied with.
    """

    method: str
    lr: float
    batch_size: int = 64
    loss_scale: float = 1.0


@dataclass(frozen=True)
class Run:
    """The test accuracy after training in a setting, for one seed of weights and order."""

    setting: Setting
    seed: int
    accuracy: float


SWEEP = [
    Setting(method, lr, batch_size)
    for batch_size, method, lr in product(EPOCHS, METHODS, STEP_SIZES)
]
SCALED = [replace(setting, loss_scale=LOSS_SCALE) for setting in SWEEP if setting.batch_size == 64]
QUICK = [
    Setting(method, lr, loss_scale=scale)
    for scale, (method, lr) in product(
        (1.0, LOSS_SCALE), zip(METHODS, (0.03, 0.003, 0.1), strict=True)
    )
]


def train(setting: Setting, seed: int) -> Run:
    """Train a network with two hidden layers; the last, incomplete batch of an epoch is used as it is."""
    (x, y), (test_x, test_y) = split_digits()
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)
    )
    optimizer = METHODS[setting.method](list(model.parameters()), setting.lr)
    num_epochs, num_batches = EPOCHS[setting.batch_size], -(-len(x) // setting.batch_size)
    schedule = PolynomialLR(optimizer, total_iters=num_epochs * num_batches, power=2.0)
    for _ in range(num_epochs):
        for batch in torch.randperm(len(x)).split(setting.batch_size):
            optimizer.zero_grad()
            (setting.loss_scale * cross_entropy(model(x[batch]), y[batch])).backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        accuracy = float((model(test_x).argmax(dim=1) == test_y).double().mean())
    return Run(setting, seed, accuracy)


def train_all(settings: Sequence[Setting], num_seeds: int) -> list[Run]:
    """Every setting with every seed."""
    tasks = list(product(settings, range(num_seeds)))
    return [train(setting, seed) for setting, seed in track(tasks, transient=True)]


def accuracy(runs: Sequence[Run], setting: Setting) -> float:
    """Mean test accuracy over the seeds, in %."""
    return 100 * fmean(run.accuracy for run in runs if run.setting == setting)


def as_table(runs: Sequence[Run]) -> Table:
    """One row per method, batch size and scale of the loss; one column per step size; the best of a row in bold."""
    found = sorted({run.setting.lr for run in runs})
    table = Table(title="Test accuracy in %, by step size", title_justify="left")
    for header in ("batch", "loss", "method", *(f"{lr:g}" for lr in found)):
        table.add_column(header, justify="left" if header == "method" else "right", no_wrap=True)
    rows = dict.fromkeys(replace(run.setting, lr=0.0) for run in runs)
    for row in rows:
        settings = [replace(row, lr=lr) for lr in found]
        values = [
            accuracy(runs, s) if any(run.setting == s for run in runs) else None for s in settings
        ]
        best = max(value for value in values if value is not None)
        cells = (
            "" if v is None else f"[{'bold' if v == best else 'default'}]{v:.1f}" for v in values
        )
        table.add_row(str(row.batch_size), f"×{row.loss_scale:g}", row.method, *cells)
    return table


def draw(path: Path, runs: Sequence[Run]) -> None:
    """Accuracy against step size, one panel per batch size; dashed for the scaled loss."""
    from matplotlib import pyplot as plt

    with plt.rc_context(svg_style("novograd")):
        figure, panels = plt.subplots(1, 3, figsize=(9, 3), layout="constrained", sharey=True)
        for axes, batch_size in zip(panels, EPOCHS, strict=True):
            for method, scale in product(METHODS, (1.0, LOSS_SCALE)):
                settings = [Setting(method, lr, batch_size, scale) for lr in STEP_SIZES]
                if any(run.setting in settings for run in runs):
                    means = [accuracy(runs, setting) for setting in settings]
                    label, line = (method, "-") if scale == 1 else (None, "--")
                    axes.semilogx(STEP_SIZES, means, line, color=STYLES[method], label=label)
            axes.set(title=f"batches of {batch_size}", xlabel="step size")
        panels[0].set_ylabel("test accuracy in %")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center")
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)


def main() -> None:
    """Train, print the table, keep the numbers and the figure."""
    options = arguments(
        "NovoGrad beside its peers on handwritten digits.",
        "novograd_digits",
        quick="one step size each, no figure",
        seeds=3,
    ).parse_args()
    torch.set_num_threads(1)  # more threads than one only wait for each other at this size
    runs = train_all(QUICK if options.quick else SWEEP + SCALED, options.seeds)
    table = as_table(runs)
    Console().print(table)
    options.output.mkdir(parents=True, exist_ok=True)
    numbers = json.dumps([asdict(run) for run in runs])
    (options.output / "novograd_digits.json").write_text(numbers + "\n")
    table.title = None
    save_table(options.output / "novograd_digits.md", table, 140)
    if not options.quick:
        draw(options.output / "novograd_digits.svg", runs)
    print(f"Written to {options.output}")


if __name__ == "__main__":
    main()
