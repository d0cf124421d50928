"""Handwritten digits with faulty workers: adaptive attacks, data that differ among workers, and where robustness ends.

All workers live in one process; their gradients are the rows of a matrix, each with momentum of its own.

    python examples/reproductions/byzantine_digits.py
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
from _shared import arguments, save_table, shuffled_digits
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.nn.functional import one_hot

from lightning_sgd import (
    ALIE,
    IPM,
    Attack,
    LabelFlip,
    Mimic,
    SignFlip,
    get_aggregator,
    partition_by_label,
)

NUM_CLASSES, WIDTH, BATCH_SIZE, LR = 10, 32, 32, 0.5
FACTORS = (0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0)
ADAPTIVE_RULES = ("mean", "krum", "multikrum", "median", "trmean", "nnm+trmean", "filter")
SORTED_RULES = ("mean", "cclip", "geomed", "nnm+trmean", "filter", "trmean", "median", "krum")


@dataclass(frozen=True)
class Setting:
    """One run.

    Attributes:
        table: Which table it belongs to.
        rule: Name of the rule.
        attack: What the faulty workers do.
        momentum: Of every worker [β].
        num_workers: Workers, faulty ones included [n].
        num_faulty: Faulty ones among them [f].
        data: How the training data are dealt to the honest workers.
        num_steps: Steps of SGD.
    """

    table: str
    rule: str
    attack: str
    momentum: float = 0.9
    num_workers: int = 16
    num_faulty: int = 5
    data: str = "alike"
    num_steps: int = 150


def settings() -> Iterator[Setting]:
    """All runs of the three tables."""
    for rule in ADAPTIVE_RULES:
        for momentum in (0.9, 0.0):
            for attack in ("optimal ALIE", "optimal IPM"):
                yield Setting("adaptive", rule, attack, momentum)
    for rule in ("mean", "median", "nnm+median"):
        for attack in ("none", "mimic", "ALIE, z = 1.5", "label flip", "IPM, ε = 5"):
            yield Setting("skewed", rule, attack, 0.9, 12, 3, "Dirichlet(0.3)", 200)
    for rule in SORTED_RULES:
        for attack in ("none", "sign flip"):
            yield Setting("sorted", rule, attack, 0.9, 12, 3, "sorted", 300)


class Digits:
    """Images and labels on 70 % and 30 % of the data set."""

    def __init__(self) -> None:
        x, y = shuffled_digits()
        cut = round(0.7 * len(y))
        self.x, self.y, self.test_x, self.test_y = x[:cut], y[:cut], x[cut:], y[cut:]

    def parts(self, kind: str, num_parts: int, generator: torch.Generator) -> list[Tensor]:
        """Indices of the samples of each honest worker."""
        if kind == "alike":
            return [torch.arange(len(self.y))] * num_parts
        if kind == "sorted":
            return partition_by_label(self.y, num_parts, 1.0, generator)
        shares = torch.distributions.Gamma(torch.full((NUM_CLASSES, num_parts), 0.3), 1.0)
        with torch.random.fork_rng():
            torch.manual_seed(generator.initial_seed())
            drawn = shares.sample()
        return self._dealt((drawn / drawn.sum(dim=1, keepdim=True)).cumsum(dim=1), num_parts)

    def _dealt(self, ends: Tensor, num_parts: int) -> list[Tensor]:
        parts: list[list[Tensor]] = [[] for _ in range(num_parts)]
        for label in range(NUM_CLASSES):
            of_label = (self.y == label).nonzero().flatten()
            cuts = (ends[label, :-1] * len(of_label)).round().long()
            for part, some in zip(parts, of_label.tensor_split(cuts), strict=True):
                part.append(some)
        return [torch.cat(part) for part in parts]


class Network:
    """A hidden layer of ReLUs, as one vector, with the gradients of many batches at once."""

    def __init__(self, generator: torch.Generator) -> None:
        self.shapes = ((64, WIDTH), (1, WIDTH), (WIDTH, NUM_CLASSES), (1, NUM_CLASSES))
        scales = (64**-0.5, 0.0, WIDTH**-0.5, 0.0)
        drawn = [
            s * torch.randn(*k, generator=generator)
            for k, s in zip(self.shapes, scales, strict=True)
        ]
        self.w = torch.cat([part.flatten() for part in drawn])

    def layers(self) -> list[Tensor]:
        """Weights and biases."""
        sizes = [a * b for a, b in self.shapes]
        return [p.view(s) for p, s in zip(torch.split(self.w, sizes), self.shapes, strict=True)]

    def gradients(self, x: Tensor, y: Tensor) -> Tensor:
        """Of the cross-entropy of each batch: x is (n, b, 64), y is (n, b), the result (n, d)."""
        w1, b1, w2, b2 = self.layers()
        hidden = (x @ w1 + b1).relu()
        error = ((hidden @ w2 + b2).softmax(dim=-1) - one_hot(y, NUM_CLASSES)) / y.shape[1]
        back = (error @ w2.T) * (hidden > 0)
        parts = (x.mT @ back, back.sum(dim=1), hidden.mT @ error, error.sum(dim=1))
        return torch.cat([part.flatten(1) for part in parts], dim=1)

    def accuracy(self, x: Tensor, y: Tensor) -> float:
        """On a data set."""
        w1, b1, w2, b2 = self.layers()
        return float((((x @ w1 + b1).relu() @ w2 + b2).argmax(dim=-1) == y).float().mean())


class Adaptive:
    """All that is known of the rule: the factor of a direction that moves it farthest, by trying."""

    def __init__(self, rule: str, num_faulty: int, kind: str) -> None:
        self.aggregator, self.num_faulty, self.kind = (
            get_aggregator(rule, num_faulty),
            num_faulty,
            kind,
        )

    def __call__(self, honest: Tensor, own: Tensor, _: torch.Generator) -> Tensor:
        """The rows that the faulty workers send."""
        mean = honest.mean(dim=0)
        direction = -mean if self.kind == "optimal IPM" else -mean.sign() * honest.std(dim=0)
        sent = [(mean + factor * direction).expand_as(own) for factor in FACTORS]
        errors = [(self.aggregator(torch.cat([honest, rows])) - mean).norm() for rows in sent]
        return sent[int(torch.stack(errors).argmax())]


def make_attack(setting: Setting) -> Attack | Adaptive | None:
    """Of the rows; label flips happen in the data."""
    attacks: dict[str, Attack] = {
        "mimic": Mimic(num_warmup_steps=40),
        "ALIE, z = 1.5": ALIE(1.5),
        "IPM, ε = 5": IPM(5.0),
        "sign flip": SignFlip(omniscient=True),
    }
    if setting.attack.startswith("optimal"):
        return Adaptive(setting.rule, setting.num_faulty, setting.attack)
    return attacks.get(setting.attack)


def train(setting: Setting, digits: Digits, seed: int = 0) -> float:
    """Accuracy on the test set at the end."""
    generator = torch.Generator().manual_seed(seed)
    n, f = setting.num_workers, setting.num_faulty
    num_honest = n if setting.attack == "none" else n - f
    parts = digits.parts(setting.data, num_honest, generator)
    parts += [torch.arange(len(digits.y))] * (n - num_honest)
    network, attack = Network(generator), make_attack(setting)
    # Without an attack there is nobody to defend against, but the rule does not know.
    rule, rows = get_aggregator(setting.rule, f), None
    for _ in range(setting.num_steps):
        fresh = network.gradients(*_batches(digits, parts, setting, generator))
        rows = fresh if rows is None else torch.lerp(fresh, rows, setting.momentum)
        if not float(rows.norm()) < 1e9:
            return 1 / NUM_CLASSES  # diverged
        sent = rows
        if attack is not None:
            honest, own = rows[: n - f], rows[n - f :]
            sent = torch.cat([honest, attack(honest, own, generator)])
        network.w = network.w - LR * rule(sent)
    return network.accuracy(digits.test_x, digits.test_y)


def _batches(
    digits: Digits, parts: Sequence[Tensor], setting: Setting, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    picked = [part[torch.randint(len(part), (BATCH_SIZE,), generator=generator)] for part in parts]
    index = torch.stack(picked)
    x, y = digits.x[index], digits.y[index]
    if setting.attack == "label flip":
        first = setting.num_workers - setting.num_faulty
        y[first:] = LabelFlip(NUM_CLASSES)(y[first:])
    return x, y


def as_table(found: dict[Setting, float], name: str) -> Table:
    """One row per rule, one column per attack and momentum."""
    of_table = {s: accuracy for s, accuracy in found.items() if s.table == name}
    columns = dict.fromkeys((s.attack, s.momentum) for s in of_table)
    several = len({momentum for _, momentum in columns}) > 1
    table = Table()
    table.add_column("rule", no_wrap=True)
    for attack, momentum in columns:
        header = f"{attack}, β = {momentum:g}" if several else attack
        table.add_column(header, justify="right", no_wrap=True)
    for rule in dict.fromkeys(s.rule for s in of_table):
        row = {(s.attack, s.momentum): a for s, a in of_table.items() if s.rule == rule}
        table.add_row(rule, *(f"{row[column]:.3f}" for column in columns))
    return table


def main() -> None:
    """Run all, print the tables, keep the numbers."""
    options = arguments(
        "Digits with faulty workers.", "byzantine", quick="the table of skewed data alone"
    ).parse_args()
    torch.set_num_threads(1)  # more threads than one only wait for each other at this size
    digits, runs = Digits(), list(settings())
    if options.quick:
        runs = [setting for setting in runs if setting.table == "skewed"]
    found = {setting: train(setting, digits) for setting in track(runs, transient=True)}
    options.output.mkdir(parents=True, exist_ok=True)
    record = [{**asdict(s), "accuracy": round(a, 4)} for s, a in found.items()]
    (options.output / "byzantine_digits.json").write_text(json.dumps(record, indent=1) + "\n")
    for name in dict.fromkeys(setting.table for setting in found):
        table = as_table(found, name)
        Console(width=140).print(table)
        save_table(options.output / f"byzantine_digits_{name}.md", table, 140)
    print(f"Written to {options.output}")


if __name__ == "__main__":
    main()
