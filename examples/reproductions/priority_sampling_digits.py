"""Priority sampling on handwritten digits: steps to equal training losses, and the controls that explain them.

A perceptron, plain SGD with a large step size, batches of 32, no warm-up epoch. Beside the default (β = 0.5) run
uniform sampling, no weights at all (β = 0), unbiased weights (β = 1) with a large and a small share of uniform draws,
and the rules that look at more samples than they train on. A second part has a fifth of the labels wrong. Written
without Lightning, so that nothing stands between the sampler and the numbers.

    python examples/reproductions/priority_sampling_digits.py
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from statistics import fmean, median, stdev
from typing import TypeAlias

import torch
from _shared import arguments, save_table
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lightning_sgd import InBatchSelection, Presampling, PrioritySampler
from lightning_sgd.functional.sampling.sample_scores import cross_entropy_score

BATCH_SIZE, NUM_STEPS, LOOK_EVERY = 32, 800, 10
TARGETS = (0.1, 0.05, 0.02, 0.01)
NOISE = 0.2
Samples: TypeAlias = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Method:
    """How batches are drawn.

    Attributes:
        mix: Share of uniform draws [λ].
        beta: Exponent of the weights [β].
        order: As of the sampler.
        look: Candidates per trained sample, for rules that look at more.
        rule: ``importance``, ``percentile`` or ``top`` among the candidates.
        shuffles: Draw permutations, as DataLoader does.
    """

    mix: float = 1.0
    beta: float = 0.0
    order: str = "proportional"
    look: int = 1
    rule: str | None = None
    shuffles: bool = False


METHODS: dict[str, Method] = {
    "uniform": Method(),
    "shuffled": Method(shuffles=True),
    "λ 0.3, β 0.5 (default)": Method(mix=0.3, beta=0.5),
    "λ 0.3, β 0": Method(mix=0.3, beta=0.0),
    "λ 0, β 0": Method(mix=0.0, beta=0.0),
    "λ 0.5, β 1": Method(mix=0.5, beta=1.0),
    "λ 0.3, β 1": Method(mix=0.3, beta=1.0),
    "λ 0.1, β 1": Method(mix=0.1, beta=1.0),
    "λ 0, β 1": Method(mix=0.0, beta=1.0),
    "by rank, λ 0.3": Method(mix=0.3, order="rank"),
    "presampling, τ_th 2": Method(look=3, rule="importance"),
    "percentile, keep 1/2": Method(look=2, rule="percentile"),
    "top 1/2": Method(look=2, rule="top"),
}
RATES = (0.3, 1.5)
NOISY = (
    "uniform",
    "shuffled",
    "λ 0.3, β 0.5 (default)",
    "λ 0.3, β 0",
    "λ 0.5, β 1",
)
NOISY_SEEDS = 3
"""With wrong labels runs differ more, so there are so many times as many."""


@dataclass
class Run:
    """What one training run showed.

    Attributes:
        method: Key of ``METHODS``.
        seed: Seed of the weights, the noise and the draws.
        noise: Share of wrong labels in training.
        lr: Step size.
        reached: By target, the step at which the loss of the training set was first below it.
        loss: Loss of the training set at the end.
        error: Share of the test set that is classified wrongly at the end.
        forwards: Samples that went through a forward pass per trained one.
    """

    method: str
    seed: int
    noise: float
    lr: float
    reached: dict[str, int] = field(default_factory=dict)
    loss: float = math.nan
    error: float = math.nan
    forwards: float = 1.0


@cache
def load_digits(noise: float, seed: int) -> tuple[Samples, Samples]:
    """Three quarters for training, with a share of wrong labels, and a quarter for testing."""
    from sklearn import datasets, model_selection

    pixels, labels = datasets.load_digits(return_X_y=True)
    x, test_x, y, test_y = map(
        torch.from_numpy,
        model_selection.train_test_split(
            pixels.astype("float32") / 16, labels, stratify=labels, random_state=0
        ),
    )
    generator = torch.Generator().manual_seed(seed)
    wrong = torch.randperm(len(y), generator=generator)[: round(noise * len(y))]
    y = y.clone()
    y[wrong] = (y[wrong] + torch.randint(1, 10, (len(wrong),), generator=generator)) % 10
    return (x, y), (test_x, test_y)


class Batches:
    """Draws batches with weights, and learns from their scores.

    Args:
        method: How.
        num_samples: Size of the training set.
        seed: Of the draws.
        losses: Losses of samples with the weights as they are.
    """

    def __init__(
        self, method: Method, num_samples: int, seed: int, losses: Callable[[Tensor], Samples]
    ) -> None:
        self.method, self.losses, self.num_samples = method, losses, num_samples
        self.sampler = PrioritySampler(
            num_samples,
            BATCH_SIZE,
            seed=seed,
            order=method.order,  # type: ignore[arg-type]  # from the table above
            uniform_mix=method.mix,
            warmup_epochs=math.inf if method.shuffles else 0,
            half_life=None,
            stratified=False,
            drop_last=True,
        )
        self.indices = self.sampler.batches()
        self.rule: Presampling | InBatchSelection | None = None
        if method.rule == "importance":
            self.rule = Presampling(method.look)
        elif method.rule is not None:
            rule: InBatchSelection = InBatchSelection(
                1 / method.look,
                method.rule,  # type: ignore[arg-type]  # from the table above
                start=0.0,
                end=1.0,
                interrupt=0,
            )
            self.rule = rule
        if self.rule is not None:
            self.rule.prepare(BATCH_SIZE)
        self.generator = torch.Generator().manual_seed(seed)
        self.num_forwards = 0

    def next(self) -> tuple[Tensor, Tensor | None]:
        """Indices and weights."""
        sampler, rule = self.sampler, self.rule
        if rule is not None:
            is_on = not isinstance(rule, Presampling) or rule.is_on
            sampler.num_candidates = self.method.look * BATCH_SIZE if is_on else BATCH_SIZE
        if next(self.indices, None) is None:  # an epoch is over
            sampler.set_epoch(sampler.epoch + 1)
            self.indices = sampler.batches()
            next(self.indices)
        self.draw = sampler.take()
        indices = self.draw.indices
        self.num_forwards += len(indices)
        if rule is None:
            return indices, self.draw.weights(self.num_samples, self.method.beta)
        if len(indices) == BATCH_SIZE:
            return indices, None
        loss, score = self.losses(indices)
        measured = score if isinstance(rule, Presampling) else loss
        numbers = torch.rand(len(indices), generator=self.generator)
        rows, weights = rule.choose(measured, numbers)
        rule.observe(measured)
        self.num_forwards += len(rows)
        return indices[rows], weights

    def learn(self, logits: Tensor, labels: Tensor) -> None:
        """Enter the scores of the batch."""
        scores = cross_entropy_score(logits.detach(), labels)
        if self.rule is None:
            self.sampler.update(self.draw, scores)
        elif len(self.draw.indices) == BATCH_SIZE:
            self.rule.observe(scores)


def train(
    name: str, seed: int, noise: float = 0.0, lr: float = 1.0, num_steps: int = NUM_STEPS
) -> Run:
    """Train a network with one hidden layer."""
    (x, y), (test_x, test_y) = load_digits(noise, seed)
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(net.parameters(), lr)
    run, num_trained = Run(name, seed, noise, lr), 0

    def losses(indices: Tensor) -> Samples:
        with torch.no_grad():
            logits = net(x[indices])
            loss = cross_entropy(logits, y[indices], reduction="none")
            return loss, cross_entropy_score(logits, y[indices])

    batches = Batches(METHODS[name], len(y), seed, losses)
    for step in range(num_steps):
        indices, weights = batches.next()
        logits = net(x[indices])
        each = cross_entropy(logits, y[indices], reduction="none")
        optimizer.zero_grad()
        (each if weights is None else weights * each).mean().backward()
        optimizer.step()
        batches.learn(logits, y[indices])
        num_trained += len(indices)
        if (step + 1) % LOOK_EVERY == 0:
            note(run, step + 1, float(losses(torch.arange(len(y)))[0].mean()))
    with torch.no_grad():
        run.error = float((net(test_x).argmax(dim=1) != test_y).double().mean())
    run.forwards = batches.num_forwards / num_trained
    return run


def note(run: Run, step: int, loss: float) -> None:
    """Enter a look at the loss of the training set."""
    run.loss = float(f"{loss:.4g}")
    for target in TARGETS:
        if loss < target:
            run.reached.setdefault(str(target), step)


def of(runs: Sequence[Run], method: str, noise: float = 0.0, lr: float = 1.0) -> list[Run]:
    """The runs of a method."""
    return [run for run in runs if (run.method, run.noise, run.lr) == (method, noise, lr)]


def steps_to(runs: Sequence[Run], method: str, target: float, lr: float = 1.0) -> float:
    """Median over the seeds of the step at which a target was reached; infinite if most never came there."""
    return median(run.reached.get(str(target), math.inf) for run in of(runs, method, lr=lr))


def clean_table(runs: Sequence[Run]) -> Table:
    """Steps to each target, by method."""
    headers = (
        "draws",
        *(f"to {target}" for target in TARGETS),
        "gain",
        "loss",
        "error %",
        "forwards",
    )
    table = new_table(headers)
    base = steps_to(runs, "uniform", 0.02)
    for method in dict.fromkeys(run.method for run in runs if (run.noise, run.lr) == (0.0, 1.0)):
        found, steps = of(runs, method), [steps_to(runs, method, target) for target in TARGETS]
        errors = [100 * run.error for run in found]
        gain = base / steps[TARGETS.index(0.02)]
        table.add_row(
            method,
            *(f"{step:.0f}" if math.isfinite(step) else "never" for step in steps),
            f"{gain:.2f}" if gain else "–",
            f"{median(run.loss for run in found):.4f}",
            f"{fmean(errors):.1f} ± {stdev(errors) if len(errors) > 1 else 0:.1f}",
            f"{fmean(run.forwards for run in found):.1f}",
        )
    return table


def rates_table(runs: Sequence[Run]) -> Table:
    """Steps to two targets by step size: a gain that a larger step size gives too is none."""
    methods = tuple(METHODS)[:3]
    table = new_table(("draws", *(f"lr {lr:g}" for lr in sorted((*RATES, 1.0)))))
    for target in (0.05, 0.02):
        for method in methods:
            steps = (steps_to(runs, method, target, lr) for lr in sorted((*RATES, 1.0)))
            cells = (f"{step:.0f}" if math.isfinite(step) else "never" for step in steps)
            table.add_row(f"{method}, to {target}", *cells)
    return table


def noisy_table(runs: Sequence[Run]) -> Table:
    """Test errors with wrong labels, by method."""
    table = new_table(("draws", "error %", "standard error", "highest"))
    for method in dict.fromkeys(run.method for run in runs if run.noise > 0):
        errors = [100 * run.error for run in of(runs, method, NOISE, 0.3)]
        spread = stdev(errors) / math.sqrt(len(errors))
        table.add_row(method, *(f"{x:.1f}" for x in (fmean(errors), spread, max(errors))))
    return table


def new_table(headers: Sequence[str]) -> Table:
    """With numbers on the right."""
    table = Table()
    for header in headers:
        table.add_column(header, justify="left" if header == "draws" else "right", no_wrap=True)
    return table


def main() -> None:
    """Train, print the tables, keep the numbers."""
    options = arguments(
        "Priority sampling beside its controls.",
        "priority_sampling_digits",
        quick="two methods, one seed",
        seeds=5,
    ).parse_args()
    torch.set_num_threads(1)  # more threads than one only wait for each other at this size
    names = tuple(METHODS)[:3] if options.quick else tuple(METHODS)
    noisy = NOISY[:2] if options.quick else NOISY
    seeds = range(1 if options.quick else options.seeds)
    tasks = [(name, seed, 0.0, 1.0) for name in names for seed in seeds]
    tasks += [(name, seed, 0.0, lr) for lr in RATES for name in names[:3] for seed in seeds]
    tasks += [
        (name, seed, NOISE, 0.3) for name in noisy for seed in range(NOISY_SEEDS * len(seeds))
    ]
    runs = [train(*task) for task in track(tasks, transient=True)]
    options.output.mkdir(parents=True, exist_ok=True)
    numbers = json.dumps([asdict(run) for run in runs])
    (options.output / "priority_sampling_digits.json").write_text(numbers + "\n")
    tables = {"digits": clean_table, "rates": rates_table, "noise": noisy_table}
    for stem, tabulate in tables.items():
        table = tabulate(runs)
        Console().print(table)
        save_table(options.output / f"priority_sampling_{stem}.md", table)
    print(f"Written to {options.output}")


if __name__ == "__main__":
    main()
