"""Overlap-Local-SGD beside Local SGD, CoCoD-SGD and EASGD: eight workers on handwritten digits, in one process.

The models of all workers are the rows of one matrix, so that every method is a few lines, written out below.

    python examples/reproductions/overlap_local_sgd_digits.py
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from itertools import product
from statistics import fmean

import torch
from _shared import Samples, arguments, save_table, shuffled_digits
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lightning_sgd import partition_by_label
from lightning_sgd.functional.distributed.overlap_local_sgd import (
    effective_step,
    move_anchor_,
    pull_back_,
    velocity_scale,
)

NUM_WORKERS, BATCH_SIZE, NUM_EPOCHS, NUM_TRAIN = 8, 16, 20, 1440
LR, PULLBACK, MOMENTUM = 0.05, 0.6, 0.7
COMPENSATION = 1 / effective_step(PULLBACK, MOMENTUM)  # 1.45
PERIODS = (2, 8, 24)
SKEWS = {"alike": 0.0, "sorted": 0.64}


class Rule(ABC):
    """What happens at a boundary. Models are the rows of one matrix, which is changed in place."""

    def __init__(self, start: Tensor) -> None:
        self.anchor, self.lr = start.clone(), LR

    @abstractmethod
    def cross(self, models: Tensor) -> None:
        """A boundary."""


class Averaging(Rule):
    """Local SGD; with period 1 parallel SGD."""

    def cross(self, models: Tensor) -> None:
        """All go on from the mean."""
        models.copy_(models.mean(dim=0, keepdim=True).expand_as(models))


class Overlap(Rule):
    """The anchor is needed at the next boundary only, so that it may as well be moved here."""

    def __init__(self, start: Tensor) -> None:
        super().__init__(start)
        self.velocity, self.previous_lr = torch.zeros_like(start), 0.0

    def cross(self, models: Tensor) -> None:
        """Pull back; then the anchor for the next boundary."""
        pull_back_(models, self.anchor, PULLBACK)
        momentum = MOMENTUM * velocity_scale(self.lr, self.previous_lr)
        move_anchor_(self.anchor, self.velocity, models.mean(dim=0), momentum)
        self.previous_lr = self.lr


class CoCoD(Rule):
    """The mean of one boundary ago, plus what has been learnt since."""

    def __init__(self, start: Tensor) -> None:
        super().__init__(start)
        self.launched: Tensor = start

    def cross(self, models: Tensor) -> None:
        """Replace what was launched by its mean."""
        models.add_(self.anchor - self.launched)
        self.launched, self.anchor = models.clone(), models.mean(dim=0)


class ElasticAveraging(Rule):
    """EASGD with its authors' nine tenths, shared by the workers."""

    def cross(self, models: Tensor) -> None:
        """Workers and centre attract each other."""
        pull = 0.9 / len(models) * (models - self.anchor)
        models.sub_(pull)
        self.anchor += pull.sum(dim=0)


METHODS: dict[str, tuple[Callable[[Tensor], Rule], float]] = {
    "Local SGD": (Averaging, 1.0),
    "Overlap": (Overlap, 1.0),
    "Overlap, γ × 1.45": (Overlap, COMPENSATION),
    "CoCoD-SGD": (CoCoD, 1.0),
    "EASGD": (ElasticAveraging, 1.0),
}


@dataclass(frozen=True)
class Run:
    """What one training showed.

    Attributes:
        method: Key of ``METHODS``.
        shards: Key of ``SKEWS``.
        period: Steps from one boundary to the next.
        seed: Of weights, shards and order.
        loss: Training loss of the mean of the models at the end.
        accuracy: Of the workers' own models on the test set, mean over the workers.
    """

    method: str
    shards: str
    period: int
    seed: int
    loss: float
    accuracy: float


@cache
def load_digits(split: int = 0) -> tuple[Samples, Samples]:
    """1440 images for training and 357 for testing, 64 pixels between 0 and 1 each; which, the split decides."""
    x, y = shuffled_digits(split)
    return (x[:NUM_TRAIN], y[:NUM_TRAIN]), (x[NUM_TRAIN:], y[NUM_TRAIN:])


def start(seed: int) -> Tensor:
    """Weights of a network 64-32-10 in a row."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 10))
    return nn.utils.parameters_to_vector(net.parameters()).detach()


def logits(models: Tensor, x: Tensor) -> Tensor:
    """Of every model, one per row, on its own images of shape (models, images, 64)."""
    parts = models.split([64 * 32, 32, 32 * 10, 10], dim=1)
    hidden = torch.baddbmm(parts[1][:, None], x, parts[0].view(-1, 32, 64).mT).relu()
    return torch.baddbmm(parts[3][:, None], hidden, parts[2].view(-1, 10, 32).mT)


def batches(
    skew: float, seed: int, num_epochs: int, num_workers: int, split: int = 0
) -> Iterator[Tensor]:
    """For every step the images of each worker's batch, reshuffled every epoch: (workers, batch)."""
    (_, y), _ = load_digits(split)
    generator = torch.Generator().manual_seed(seed)
    own = torch.stack(partition_by_label(y, num_workers, skew, generator))
    for _ in range(num_epochs):
        order = torch.rand(own.shape, generator=generator).argsort(dim=1)
        for batch in order.split(BATCH_SIZE, dim=1):
            if batch.shape[1] == BATCH_SIZE:
                yield own.gather(1, batch)


def decay(step: int, num_steps: int) -> float:
    """The step size as a part of what it is at first: a tenth for the last quarter."""
    return 0.1 if step >= 0.75 * num_steps else 1.0


def simulate(
    rule: Rule, models: Tensor, index: Sequence[Tensor], period: int, factor: float
) -> Tensor:
    """Nesterov SGD on every worker, and the rule at every boundary; the models of all workers at the end."""
    (x, y), _ = load_digits()
    models = models.clone().requires_grad_()
    optimizer = torch.optim.SGD([models], momentum=0.9, nesterov=True, lr=LR)
    for step, batch in enumerate(index):
        lr = factor * LR * decay(step, len(index))
        optimizer.param_groups[0]["lr"] = rule.lr = lr
        optimizer.zero_grad()
        loss = cross_entropy(logits(models, x[batch]).flatten(0, 1), y[batch].flatten())
        (len(models) * loss).backward()  # of each worker the mean over its own batch
        optimizer.step()
        if (step + 1) % period == 0:
            with torch.no_grad():
                rule.cross(models)
    return models.detach()


def train(
    method: str,
    shards: str,
    period: int,
    seed: int,
    num_epochs: int = NUM_EPOCHS,
    num_workers: int = NUM_WORKERS,
) -> Run:
    """One training of one method."""
    make, factor = METHODS[method]
    index = list(batches(SKEWS[shards], seed, num_epochs, num_workers))
    first = start(seed)
    models = simulate(make(first), first.repeat(num_workers, 1), index, period, factor)
    return Run(method, shards, period, seed, *evaluate(models))


def evaluate(models: Tensor, split: int = 0) -> tuple[float, float]:
    """Training loss of the mean model, and test accuracy of the workers' own."""
    (x, y), (test_x, test_y) = load_digits(split)
    loss = cross_entropy(logits(models.mean(dim=0, keepdim=True), x[None])[0], y)
    guesses = logits(models, test_x.expand(len(models), -1, -1)).argmax(dim=2)
    return float(f"{loss:.4g}"), float(f"{(guesses == test_y).double().mean():.4g}")


def train_all(num_seeds: int, num_epochs: int) -> list[Run]:
    """Every method with every period on both kinds of shards, and parallel SGD."""
    settings = [(method, shards, h) for method, shards, h in product(METHODS, SKEWS, PERIODS)]
    settings += [("Local SGD", shards, 1) for shards in SKEWS]
    return [
        train(*setting, seed, num_epochs)
        for setting, seed in track(list(product(settings, range(num_seeds))), transient=True)
    ]


def cell(runs: Sequence[Run], method: str, shards: str, period: int) -> str:
    """Mean loss and accuracy over the seeds."""
    found = [r for r in runs if (r.method, r.shards, r.period) == (method, shards, period)]
    return f"{fmean(r.loss for r in found):.3f} ({100 * fmean(r.accuracy for r in found):.1f})"


def as_table(runs: Sequence[Run]) -> Table:
    """One line per method; losses, in brackets accuracies in %."""
    table = Table()
    table.add_column("shards, method", no_wrap=True)
    periods = sorted({run.period for run in runs} - {1})
    for period in periods:
        table.add_column(f"τ = {period}", justify="right", no_wrap=True)
    for shards in SKEWS:
        parallel = cell(runs, "Local SGD", shards, 1)
        table.add_row(f"{shards}, parallel SGD", *[parallel] * len(periods))
        for method in METHODS:
            cells = (cell(runs, method, shards, period) for period in periods)
            table.add_row(f"{shards}, {method}", *cells)
    return table


def main() -> None:
    """Train, print the table, keep the numbers."""
    options = arguments(
        "Overlap-Local-SGD beside its peers on digits.",
        "overlap_local_sgd_digits",
        quick="one seed, eight epochs",
        seeds=4,
    ).parse_args()
    torch.set_num_threads(1)  # more threads than one only wait for each other at this size
    runs = train_all(*((1, 8) if options.quick else (options.seeds, NUM_EPOCHS)))
    options.output.mkdir(parents=True, exist_ok=True)
    numbers = json.dumps([asdict(run) for run in runs])
    (options.output / "overlap_local_sgd_digits.json").write_text(numbers + "\n")
    table = as_table(runs)
    Console().print(table)
    save_table(options.output / "overlap_local_sgd_digits.md", table)
    print(f"Written to {options.output}")


if __name__ == "__main__":
    main()
