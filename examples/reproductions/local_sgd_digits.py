"""Local SGD on handwritten digits with eight ranks, dealt evenly and sorted by label, beside its controls.

Eight small networks live in one process as stacked tensors; nothing stands between the method and the numbers, and
schedule and tail are those of the strategy. A second table gives the exact risk of one-shot averaging in least squares.

    python examples/reproductions/local_sgd_digits.py
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch
from _shared import markdown, shuffled_digits
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.nn.functional import cross_entropy

from lightning_sgd import partition_by_label
from lightning_sgd.functional.distributed.local_sgd import PeriodSchedule, RunningMean

NUM_RANKS, BATCH_SIZE, WIDTH = 8, 16, 32
LR, MOMENTUM = 0.05, 0.9
SKEWS = {"evenly dealt": 0.0, "sorted by label": 0.64}


@dataclass(frozen=True, slots=True)
class Method:
    """How the ranks share what they learn.

    Attributes:
        name: For the table.
        period: Steps between two averages; ``None`` for one average at the end.
        tail: Whether that average is of the second half of each rank's models.
        shares: Whether there is any average at all.
    """

    name: str
    period: int | None
    tail: bool = False
    shares: bool = True


METHODS = (
    Method("parallel SGD", 1),
    Method("Local SGD, H = 2", 2),
    Method("Local SGD, H = 8", 8),
    Method("Local SGD, H = 24", 24),
    Method("one-shot, last models", None),
    Method("one-shot, tails", None, tail=True),
    Method("no exchange", None, shares=False),
)


def load() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """1440 images and labels to train with, 357 to test."""
    x, y = shuffled_digits()
    return x[:1440], y[:1440], x[1440:], y[1440:]


def networks(seed: int) -> list[Tensor]:
    """Weights and biases of a 64-32-10 network, the same for every rank, with ranks as the first dimension."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(num_in: int, *shape: int) -> Tensor:
        one = (2 * torch.rand(shape, generator=generator) - 1) / math.sqrt(num_in)
        return one.expand(NUM_RANKS, *shape).clone().requires_grad_()

    return [
        uniform(64, 64, WIDTH),
        uniform(64, 1, WIDTH),
        uniform(WIDTH, WIDTH, 10),
        uniform(WIDTH, 1, 10),
    ]


def logits(params: Sequence[Tensor], x: Tensor) -> Tensor:
    """Of every rank for its own batch: (ranks, batch, 64) to (ranks, batch, 10)."""
    w1, b1, w2, b2 = params
    return (x @ w1 + b1).relu() @ w2 + b2


def batches(parts: Sequence[Tensor], num_steps: int, seed: int) -> Iterator[Tensor]:
    """For every step the indices of each rank's batch, reshuffled every epoch."""
    generator = torch.Generator().manual_seed(seed)
    per_epoch = len(parts[0]) // BATCH_SIZE
    for step in range(num_steps):
        if step % per_epoch == 0:
            shuffled = [part[torch.randperm(len(part), generator=generator)] for part in parts]
        begin = step % per_epoch * BATCH_SIZE
        yield torch.stack([part[begin : begin + BATCH_SIZE] for part in shuffled])


@torch.no_grad()
def average(params: Sequence[Tensor]) -> None:
    """Give every rank the mean."""
    for param in params:
        param.copy_(param.mean(dim=0, keepdim=True).expand_as(param))


def train(
    method: Method, data: Sequence[Tensor], parts: Sequence[Tensor], num_epochs: int, seed: int
) -> list[Tensor]:
    """The networks of all ranks at the end."""
    x, y, *_ = data
    num_steps = num_epochs * (len(parts[0]) // BATCH_SIZE)
    params = networks(seed)
    optimizer = torch.optim.SGD(params, LR, MOMENTUM, nesterov=True)
    schedule, tail, since = PeriodSchedule(method.period), RunningMean(params), 0
    for step, indices in enumerate(batches(parts, num_steps, seed), start=1):
        optimizer.param_groups[0]["lr"] = LR * (0.1 if step > 0.75 * num_steps else 1)
        out = logits(params, x[indices])
        loss = cross_entropy(out.flatten(0, 1), y[indices].flatten()) * NUM_RANKS
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        since += 1
        if schedule.is_due(step, since):
            average(params)
            since = 0
        if method.tail and step > num_steps // 2:
            tail.update(params)
    params = [value.clone() for value in tail.values] if method.tail else params
    if method.shares:
        average(params)
    return params


@torch.no_grad()
def evaluate(params: Sequence[Tensor], data: Sequence[Tensor]) -> tuple[float, float]:
    """Loss on all training images and accuracy in the test, the means over the ranks' models."""
    x, y, x_test, y_test = data
    out = logits(params, x.expand(NUM_RANKS, -1, -1))
    loss = cross_entropy(out.flatten(0, 1), y.repeat(NUM_RANKS))
    hits = logits(params, x_test.expand(NUM_RANKS, -1, -1)).argmax(dim=-1) == y_test
    return float(loss), float(hits.float().mean())


def compare(num_epochs: int, num_seeds: int) -> dict[tuple[str, str], tuple[float, float]]:
    """Loss and accuracy by method and by the way in which the images are dealt."""
    data, results = load(), {}
    cases = [(method, dealt) for method in METHODS for dealt in SKEWS]
    for method, dealt in track(cases, description="Training ..."):
        runs = []
        for seed in range(num_seeds):
            generator = torch.Generator().manual_seed(seed)
            parts = partition_by_label(data[1], NUM_RANKS, SKEWS[dealt], generator)
            runs.append(evaluate(train(method, data, parts, num_epochs, seed), data))
        losses, accuracies = zip(*runs, strict=True)
        results[method.name, dealt] = fmean(losses), fmean(accuracies)
    return results


def one_shot_risk(num_ranks: int, *, num_samples: int = 80_000, batch_size: int = 8) -> float:
    """Exact excess risk of the mean of P tail averages, for Gaussian inputs with eigenvalues 1/k, k ≤ 50.

    The covariance of the error follows its recursion; only its diagonal is needed. The step size is half of the
    largest with the optimal rate.

    Args:
        num_ranks: Machines [P], each with its share of the samples.
        num_samples: Of all machines together [n].
        batch_size: Of each machine [b].
    """
    h = 1 / torch.arange(1, 51, dtype=torch.float64)
    noise = 0.01 * h
    gamma = batch_size / (float(h.sum()) + 2 + batch_size - 1)
    num_steps = num_samples // (num_ranks * batch_size)
    start, q = num_steps // 2, 1 - gamma * h
    phi, tail, bias = torch.ones_like(h), torch.zeros_like(h), torch.zeros_like(h)
    length = num_steps - start
    for step in range(1, num_steps + 1):
        shrunk = (1 - 2 * gamma * h + gamma**2 * (batch_size + 1) / batch_size * h**2) * phi
        phi = shrunk + gamma**2 / batch_size * (h * (h @ phi) + noise)
        if step > start:
            correlated = 2 * q * (1 - q ** (num_steps - step)) / (gamma * h)
            tail += phi * (1 + correlated) / length**2
            bias += q**step / length
    covariance = tail / num_ranks + (1 - 1 / num_ranks) * bias**2
    return 0.5 * float(h @ covariance)


def report(results: dict[tuple[str, str], tuple[float, float]]) -> Table:
    """One row per method."""
    table = Table()
    table.add_column("method")
    for dealt in SKEWS:
        table.add_column(f"loss, {dealt}", justify="right")
        table.add_column("accuracy", justify="right")
    for method in METHODS:
        cells = [results[method.name, dealt] for dealt in SKEWS]
        table.add_row(
            method.name,
            *(text for loss, accuracy in cells for text in (f"{loss:.3f}", f"{accuracy:.3f}")),
        )
    return table


def main() -> None:
    """Print both tables, and write them where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one seed, few epochs")
    parser.add_argument("--output", type=Path, help="Markdown file for the tables")
    args = parser.parse_args()
    tables = [report(compare(*((3, 1) if args.quick else (20, 4))))]
    risks = Table()
    risks.add_column("machines")
    risks.add_column("steps of each", justify="right")
    risks.add_column("exact excess risk", justify="right")
    for num_ranks in (1, 2, 4, 8):
        steps = 80_000 // (8 * num_ranks)
        risks.add_row(str(num_ranks), str(steps), f"{one_shot_risk(num_ranks):.3e}")
    text = "\n\n".join(map(markdown, [*tables, risks]))
    print(text)
    if args.output:
        args.output.write_text(f"`python examples/reproductions/local_sgd_digits.py`\n\n\n{text}")


if __name__ == "__main__":
    main()
