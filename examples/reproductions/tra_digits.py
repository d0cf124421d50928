"""TRSGD and TRAdam on handwritten digits in batches of four, with the controls that tell their parts apart.

Trajectory regularisation does two things: it pulls to the start of a stage, and it makes the steps within a stage
smaller. So there are runs with one of the two only, and runs of the plain optimizer at the average step size of a
stage. Written without Lightning, so that nothing stands between the optimizers and the numbers.

    python examples/reproductions/tra_digits.py
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from statistics import fmean
from typing import TypeAlias

import torch
from _shared import arguments, save_table, split_digits
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, Adam, Optimizer

from lightning_sgd import TRSGD, TRAdam

BATCH_SIZE, NUM_EPOCHS = 4, 12
SHARE = sum(1 / k for k in range(1, 11)) / 10
"""Average step size of a stage of ten steps, in units of the first: 0.2929."""
DIVERGED = 1e3

Parameters: TypeAlias = list[Tensor]


def sgd(params: Parameters, lr: float) -> Optimizer:
    """SGD with the momentum and weight decay that are the defaults of TRSGD."""
    return SGD(params, lr, momentum=0.9, weight_decay=1e-4)


METHODS: dict[str, Callable[[Parameters], Optimizer]] = {
    "SGD, lr 0.1": lambda params: sgd(params, 0.1),
    "TRSGD, lr 0.1": lambda params: TRSGD(params, 0.1),
    "falling steps only": lambda params: TRSGD(params, 0.1, lambda_w=0.0),
    "pull only": lambda params: TRSGD(params, 0.1, inner_lr_decay="none"),
    "pull only, ten times": lambda params: TRSGD(params, 0.1, lambda_w=0.1, inner_lr_decay="none"),
    "TRSGD, pull fifty times": lambda params: TRSGD(params, 0.1, lambda_w=0.5),
    "SGD, lr 0.0293": lambda params: sgd(params, 0.1 * SHARE),
    "SGD, lr 0.01": lambda params: sgd(params, 0.01),
    "Adam, lr 0.001": lambda params: Adam(params, 1e-3, weight_decay=1e-4),
    "TRAdam, lr 0.001": TRAdam,
    "Adam, lr 0.000293": lambda params: Adam(params, 1e-3 * SHARE, weight_decay=1e-4),
    "Adam, lr 0.01": lambda params: Adam(params, 1e-2, weight_decay=1e-4),
    "TRAdam, lr 0.01": lambda params: TRAdam(params, 1e-2),
    "Adam, lr 0.00293": lambda params: Adam(params, 1e-2 * SHARE, weight_decay=1e-4),
}
QUICK = ("SGD, lr 0.1", "TRSGD, lr 0.1", "SGD, lr 0.0293")


@dataclass(frozen=True)
class Run:
    """What one training run showed.

    Attributes:
        method: Key of ``METHODS``.
        seed: Seed of the weights and of the order of the samples.
        losses: Mean training loss of each epoch, as it was met.
        accuracy: Share of the test set that is classified correctly at the end.
    """

    method: str
    seed: int
    losses: list[float]
    accuracy: float


def drop(optimizer: Optimizer, epoch: int, num_epochs: int) -> None:
    """The authors' schedule: a tenth of the step size after half of the time, and again after three quarters."""
    if epoch in (num_epochs // 2, 3 * num_epochs // 4):
        for group in optimizer.param_groups:
            group["lr"] *= 0.1


def train(method: str, seed: int, num_epochs: int = NUM_EPOCHS) -> Run:
    """Train a network with one hidden layer."""
    (x, y), (test_x, test_y) = split_digits()
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = METHODS[method](list(model.parameters()))
    losses = []
    for epoch in range(num_epochs):
        drop(optimizer, epoch, num_epochs)
        total = torch.zeros(())
        for batch in torch.randperm(len(x)).split(BATCH_SIZE):
            optimizer.zero_grad()
            loss = cross_entropy(model(x[batch]), y[batch])
            loss.backward()
            optimizer.step()
            total += loss.detach() * len(batch)
        losses.append(float(f"{total.item() / len(x):.4g}"))
    with torch.no_grad():
        accuracy = float((model(test_x).argmax(dim=1) == test_y).double().mean())
    return Run(method, seed, losses, accuracy)


def train_all(methods: Sequence[str], num_seeds: int, num_epochs: int) -> list[Run]:
    """Every method with every seed."""
    tasks = list(product(methods, range(num_seeds)))
    return [train(method, seed, num_epochs) for method, seed in track(tasks, transient=True)]


def summary(runs: Sequence[Run], method: str) -> tuple[float, float, float, float]:
    """Mean loss before the first drop and at the end, mean and lowest test accuracy in %."""
    found = [run for run in runs if run.method == method]
    half = len(found[0].losses) // 2
    accuracies = [100 * run.accuracy for run in found]
    return (
        fmean(run.losses[half - 1] for run in found),
        fmean(run.losses[-1] for run in found),
        fmean(accuracies),
        min(accuracies),
    )


def as_table(runs: Sequence[Run]) -> Table:
    """One row per method."""
    table = Table()
    headers = ("run", "early loss", "last loss", "test %", "worst seed")
    for header in headers:
        table.add_column(header, justify="left" if header == "run" else "right", no_wrap=True)
    for method in dict.fromkeys(run.method for run in runs):
        early, late, accuracy, worst = summary(runs, method)
        losses = (f"{loss:.3f}" if loss < DIVERGED else "diverged" for loss in (early, late))
        table.add_row(method, *losses, f"{accuracy:.1f}", f"{worst:.1f}")
    return table


def main() -> None:
    """Train, print the table, keep the numbers."""
    options = arguments(
        "TRSGD and TRAdam beside their controls.",
        "tra_digits",
        quick="three runs of four epochs",
        seeds=3,
    ).parse_args()
    torch.set_num_threads(1)  # more threads than one only wait for each other at this size
    methods, num_seeds, num_epochs = (
        (QUICK, 1, 4) if options.quick else (tuple(METHODS), options.seeds, NUM_EPOCHS)
    )
    runs = train_all(methods, num_seeds, num_epochs)
    table = as_table(runs)
    Console().print(table)
    options.output.mkdir(parents=True, exist_ok=True)
    numbers = json.dumps([asdict(run) for run in runs])
    (options.output / "tra_digits.json").write_text(numbers + "\n")
    save_table(options.output / "tra_digits.md", table)
    print(f"Written to {options.output}")


if __name__ == "__main__":
    main()
