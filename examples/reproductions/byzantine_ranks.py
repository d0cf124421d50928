"""Handwritten digits on real ranks of which some are wrong: DDP or the mean beside robust rules, and where these fail.

Every run is a training by the Trainer on processes that talk by gloo. A wrong rank multiplies its loss by −100, NaN or
infinity, or has its labels flipped, with DDP as with ByzantineStrategy; attacks that know the gradients of the others
are drills of ByzantineStrategy, whose mean is DDP's.

    python examples/reproductions/byzantine_ranks.py
"""

from __future__ import annotations

import json
import logging
import math
import os
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from _shared import arguments, markdown, shuffled_digits
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.strategies import DDPStrategy, Strategy
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Sampler, TensorDataset

from lightning_sgd import (
    ALIE,
    IPM,
    Attack,
    BitFlip,
    ByzantineStrategy,
    GaussianAttack,
    LabelFlip,
    Mean,
    Mimic,
    partition_by_label,
)

LR, MOMENTUM, BATCH_SIZE, NUM_CLASSES, NUM_TRAIN = 0.5, 0.9, 32, 10, 1437
FACTORS = {"sign flip × 100": -100.0, "NaN": math.nan, "infinity": math.inf}
DRILLS: dict[str, Attack] = {
    "ALIE, z = 1.5": ALIE(1.5),
    "IPM, ε = 5": IPM(5.0),
    "Gaussian, σ = 10": GaussianAttack(std=10.0),
    "mimic": Mimic(),
    "bit flip": BitFlip(num_coordinates=100),
}
ATTACKS = ("none", *FACTORS, *DRILLS, "label flip")
SHOWN_ON_SEVEN = ("none", "sign flip × 100", "ALIE, z = 1.5", "label flip")


@dataclass(frozen=True)
class Setting:
    """One training.

    Attributes:
        dealt: How the images are dealt to the ranks: ``iid``, ``dirichlet`` or ``sorted``.
        attack: What the wrong ranks do.
        rule: Name of the rule, or ``DDP``.
        num_ranks: Processes [n].
        num_wrong: The last so many of them are wrong [f].
    """

    dealt: str
    attack: str
    rule: str
    num_ranks: int
    num_wrong: int


class Classifier(LightningModule):
    """A 64-32-10 network; some ranks compute a wrong loss.

    Args:
        setting: Says which, and how.
    """

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        self.setting = setting
        self.net = torch.nn.Sequential(
            torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, NUM_CLASSES)
        )

    @property
    def is_wrong(self) -> bool:
        """Whether this rank is one of those."""
        return self.global_rank >= self.setting.num_ranks - self.setting.num_wrong

    def training_step(self, batch: list[Tensor]) -> Tensor:
        """Cross-entropy, or what a wrong rank takes for it."""
        images, labels = batch
        if self.is_wrong and self.setting.attack == "label flip":
            labels = LabelFlip(NUM_CLASSES)(labels)
        factor = FACTORS.get(self.setting.attack, 1.0) if self.is_wrong else 1.0
        return factor * cross_entropy(self.net(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Workers have momentum of their own; DDP, which has no workers, has the same in the optimizer."""
        beta = MOMENTUM if self.setting.rule == "DDP" else 0.0
        return torch.optim.SGD(self.parameters(), LR, momentum=beta, dampening=beta)


class Dealt(Sampler[int]):
    """Draws from the part of this rank.

    Args:
        parts: For each rank the numbers of its images.
        num_samples: How many to draw.
    """

    def __init__(self, parts: list[Tensor], num_samples: int) -> None:
        self.parts, self.num_samples = parts, num_samples

    def __iter__(self) -> Iterator[int]:
        """With replacement, from a generator of this rank."""
        rank = torch.distributed.get_rank()
        generator = torch.Generator().manual_seed(rank)
        part = self.parts[rank]
        chosen = torch.randint(len(part), (self.num_samples,), generator=generator)
        return iter(part[chosen].tolist())

    def __len__(self) -> int:
        return self.num_samples


def load() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images and labels to train with, then to test."""
    x, y = shuffled_digits()
    return x[:NUM_TRAIN], y[:NUM_TRAIN], x[NUM_TRAIN:], y[NUM_TRAIN:]


def deal(setting: Setting, labels: Tensor) -> list[Tensor]:
    """The images of each rank; wrong ranks have a part like the others."""
    generator = torch.Generator().manual_seed(0)
    if setting.dealt == "iid":
        return [torch.arange(len(labels))] * setting.num_ranks
    if setting.dealt == "sorted":
        return partition_by_label(labels, setting.num_ranks, 1.0, generator)
    alpha = torch.full((setting.num_ranks,), 0.3)
    owners = torch.empty(len(labels), dtype=torch.long)
    for label in range(NUM_CLASSES):  # the shares of a class are drawn from Dirichlet(0.3)
        shares = torch._sample_dirichlet(alpha, generator)
        of_class = (labels == label).nonzero().flatten()
        owners[of_class] = torch.multinomial(
            shares, len(of_class), replacement=True, generator=generator
        )
    return [(owners == rank).nonzero().flatten() for rank in range(setting.num_ranks)]


def strategy(setting: Setting) -> Strategy:
    """DDP, or the rule, with a drill where the attack is one."""
    processes: dict[str, Any] = {"start_method": "fork", "timeout": timedelta(seconds=60)}
    if setting.rule == "DDP":
        return DDPStrategy(**processes)
    attack, wrong = DRILLS.get(setting.attack), setting.num_wrong
    wrong_ranks = list(range(setting.num_ranks - wrong, setting.num_ranks)) if attack else []
    is_mean = setting.rule == "mean"
    return ByzantineStrategy(
        Mean() if is_mean else setting.rule,
        0 if is_mean else wrong,
        worker_momentum=MOMENTUM,
        attack=attack,
        byzantine_ranks=wrong_ranks,
        **processes,
    )


def run(setting: Setting, num_steps: int) -> float:
    """Accuracy in the test after one training."""
    seed_everything(0, verbose=False)
    x, y, x_test, y_test = load()
    module = Classifier(setting)
    sampler = Dealt(deal(setting, y), BATCH_SIZE * num_steps)
    trainer = Trainer(
        accelerator="cpu",
        devices=setting.num_ranks,
        strategy=strategy(setting),
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    try:
        trainer.fit(module, DataLoader(TensorDataset(x, y), BATCH_SIZE, sampler=sampler))
    except Exception as error:  # as the first rank that failed said it
        if "no worker has a finite gradient" not in str(error):
            raise
        return math.nan
    with torch.no_grad():
        return float((module.net(x_test).argmax(dim=1) == y_test).float().mean())


def settings() -> list[Setting]:
    """All runs of the tables."""
    iid = [
        Setting("iid", attack, rule, 4, 1)
        for attack in ATTACKS
        for rule in ("mean" if attack in DRILLS else "DDP", "filter")
    ]
    iid += [Setting("iid", attack, "filter", 7, 2) for attack in SHOWN_ON_SEVEN]
    skewed = [
        Setting("dirichlet", attack, rule, 5, 1)
        for attack in ("none", "mimic", "ALIE, z = 1.5", "label flip", "sign flip × 100")
        for rule in ("mean" if attack in DRILLS else "DDP", "median", "nnm+median", "filter")
    ]
    apart = [
        Setting("sorted", attack, rule, 5, 1)
        for attack in ("none", "sign flip × 100")
        for rule in ("DDP", "cclip", "geomed", "nnm+trmean", "filter", "median")
    ]
    return iid + skewed + apart


def table(results: dict[Setting, float], dealt: str) -> str:
    """One row per attack, one column per rule, in Markdown."""
    shown = [setting for setting in results if setting.dealt == dealt]
    names = dict.fromkeys(_column(setting) for setting in shown)
    made = Table()
    for heading in ("attack", *names):
        made.add_column(heading, justify="left" if heading == "attack" else "right")
    for attack in dict.fromkeys(setting.attack for setting in shown):
        cells = {_column(s): _shown(results[s]) for s in shown if s.attack == attack}
        made.add_row(attack, *(cells.get(name, "") for name in names))
    return markdown(made)


def _shown(accuracy: float) -> str:
    return "diverged" if math.isnan(accuracy) else f"{accuracy:.3f}"


def _column(setting: Setting) -> str:
    if setting.rule in ("DDP", "mean"):
        return "DDP, the mean"
    return f"{setting.rule}, 2 of 7 wrong" if setting.num_ranks == 7 else setting.rule


def main() -> None:
    """Train, print the tables, and write them where asked."""
    args = arguments(
        "Wrong ranks beside DDP and robust rules.", None, quick="two short runs"
    ).parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    chosen, num_steps = settings(), 150
    if args.quick:
        chosen = [Setting("iid", "NaN", rule, 4, 1) for rule in ("DDP", "filter")]
        num_steps = 30
    results = {s: run(s, num_steps) for s in track(chosen, description="Training ...")}
    tables = {dealt: table(results, dealt) for dealt in dict.fromkeys(s.dealt for s in results)}
    print("\n".join(tables.values()))
    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)
        for dealt, text in tables.items():
            (args.output / f"byzantine_ranks_{dealt}.md").write_text(text)
        runs = [
            {**asdict(s), "accuracy": None if math.isnan(a) else round(a, 4)}
            for s, a in results.items()
        ]
        (args.output / "byzantine_ranks.json").write_text(
            json.dumps(runs, indent=1, ensure_ascii=False) + "\n"
        )


if __name__ == "__main__":
    main()
