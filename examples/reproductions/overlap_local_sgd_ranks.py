"""Overlap-Local-SGD on real ranks: four processes train on handwritten digits under Lightning, beside its controls.

Data, weights and order are those of overlap_local_sgd_digits.py, where a training is a few lines in one process: every
training is repeated there, and must lead to the same models.

    python examples/reproductions/overlap_local_sgd_ranks.py
"""

from __future__ import annotations

import json
import logging
import tempfile
import warnings
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from _shared import arguments, save_table
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, Strategy
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from overlap_local_sgd_digits import (
    LR,
    METHODS,
    MOMENTUM,
    NUM_EPOCHS,
    PERIODS,
    PULLBACK,
    SKEWS,
    Run,
    as_table,
    batches,
    decay,
    evaluate,
    load_digits,
    start,
)
from overlap_local_sgd_digits import train as simulated
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset

from lightning_sgd import LocalSGDStrategy, OverlapLocalSGDStrategy
from lightning_sgd.strategies._base.parameter_averaging import ParameterAveragingStrategy
from lightning_sgd.strategies._base.replica import Replica, clone_all, copy_all_
from lightning_sgd.strategies._comm.collectives import Purpose

NUM_RANKS = 4
PROCESSES: dict[str, Any] = {"start_method": "fork", "timeout": timedelta(seconds=60)}
OURS: dict[str, Any] = {**PROCESSES, "sigterm_every_n_batches": 0}


class Control(ParameterAveragingStrategy):
    """A method for comparison that waits for the mean of all models at every boundary.

    Args:
        period: Steps from one boundary to the next.
    """

    def __init__(self, period: int) -> None:
        settings = {**OURS, "process_group_backend": None, "initial_weights": "broadcast"}
        super().__init__(buffers="average", optimizer_state="keep", **settings)
        self.period = period
        self.anchor: list[Tensor] = []
        self.launched: list[Tensor] = []

    def describe(self) -> str:
        """For the line at the start."""
        return f"compared with others every {self.period} steps"

    def before_step(self, replica: Replica) -> None:
        """Anchors are the weights before the first step."""
        if not self.anchor:
            self.anchor, self.launched = clone_all(replica.tensors), clone_all(replica.tensors)

    def after_step(self, replica: Replica) -> None:
        """At a boundary, the rule."""
        if replica.num_steps % self.period == 0:
            self.cross(replica)

    def mean(self, replica: Replica) -> list[Tensor]:
        """Of the models of all ranks."""
        assert self.exchange is not None
        replica.flat.pack()
        self.exchange.all_reduce_mean(replica.flat, Purpose.ROUND, replica.num_steps)
        return clone_all(replica.flat.views)

    @abstractmethod
    def cross(self, replica: Replica) -> None:
        """What happens at a boundary."""


class CoCoDStrategy(Control):
    """The mean of one boundary ago, plus what has been learnt since."""

    def cross(self, replica: Replica) -> None:
        """Replace what was launched by its mean."""
        parts = zip(replica.tensors, self.anchor, self.launched, strict=True)
        copy_all_(replica.tensors, [x + mean - launched for x, mean, launched in parts])
        self.launched, self.anchor = clone_all(replica.tensors), self.mean(replica)


class ElasticAveragingStrategy(Control):
    """EASGD; every rank has a copy of the centre."""

    def cross(self, replica: Replica) -> None:
        """Ranks and centre attract each other."""
        mean, pairs = self.mean(replica), list(zip(replica.tensors, self.anchor, strict=True))
        copy_all_(replica.tensors, [x - 0.9 / NUM_RANKS * (x - centre) for x, centre in pairs])
        self.anchor = [c + 0.9 * (m - c) for c, m in zip(self.anchor, mean, strict=True)]


def overlap(period: int, *, compensates: bool) -> Strategy:
    """With the settings of the other script."""
    return OverlapLocalSGDStrategy(period, PULLBACK, MOMENTUM, lr_compensation=compensates, **OURS)


STRATEGIES: dict[str, Callable[[int], Strategy]] = {
    "Local SGD": lambda period: LocalSGDStrategy(period, **OURS),
    "Overlap": partial(overlap, compensates=False),
    "Overlap, γ × 1.45": partial(overlap, compensates=True),
    "CoCoD-SGD": CoCoDStrategy,
    "EASGD": ElasticAveragingStrategy,
}


class OwnBatches(Dataset[tuple[Tensor, Tensor]]):
    """The batches of one rank, in order.

    Args:
        index: Which images, of shape (steps, images).
        split: Which images are for training.
    """

    def __init__(self, index: Tensor, split: int) -> None:
        self.index, self.split = index, split

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        (x, y), _ = load_digits(self.split)
        return x[self.index[step]], y[self.index[step]]


class DigitsModule(LightningModule):
    """A network 64-32-10.

    Args:
        seed: Of the weights.
        index: Batches of all ranks, of shape (steps, ranks, images).
        split: Which images are for training.
    """

    def __init__(self, seed: int, index: Tensor, split: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
        nn.utils.vector_to_parameters(start(seed), self.net.parameters())
        self.index, self.split = index, split

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Cross-entropy."""
        return cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Nesterov SGD, with a tenth of the step size at the end."""
        optimizer = torch.optim.SGD(self.parameters(), LR, momentum=0.9, nesterov=True)
        factors = partial(decay, num_steps=len(self.index))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factors)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def train_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """This rank's batches."""
        own = OwnBatches(self.index[:, self.global_rank], self.split)
        return DataLoader(own, batch_size=None)


class Watch(Callback):
    """Writes down the models of all ranks after the last step, and how far apart they were after every step.

    Args:
        file: Where to.
    """

    def __init__(self, file: Path) -> None:
        self.file, self.models = file, torch.empty(0)
        self.distances: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Gather the models."""
        mine = nn.utils.parameters_to_vector(pl_module.parameters()).detach()
        rows = [torch.empty_like(mine) for _ in range(trainer.world_size)]
        dist.all_gather(rows, mine)
        self.models = torch.stack(rows)
        apart = (self.models - self.models.mean(dim=0)).square().sum(dim=1).mean().sqrt()
        self.distances.append(float(apart))

    def on_fit_end(self, trainer: Trainer, *_: Any) -> None:
        """Keep them."""
        if trainer.is_global_zero:
            torch.save((self.models, self.distances), self.file)


def train(
    strategy: Strategy, skew: float, seed: int, num_epochs: int, split: int = 0
) -> tuple[Tensor, list[float]]:
    """Train on four processes; their models before the last average, and their distances."""
    index = torch.stack(list(batches(skew, seed, num_epochs, NUM_RANKS, split)))
    with tempfile.TemporaryDirectory() as folder:
        watch = Watch(Path(folder) / "models")
        trainer = Trainer(
            accelerator="cpu",
            devices=NUM_RANKS,
            strategy=strategy,
            max_epochs=1,
            callbacks=[watch],
            use_distributed_sampler=False,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(DigitsModule(seed, index, split))
        models, distances = torch.load(watch.file)
    return models, distances


@dataclass(frozen=True)
class Both(Run):
    """A run on real ranks, and the loss of the same training in one process.

    Attributes:
        simulated_loss: There.
    """

    simulated_loss: float


def run(method: str, shards: str, period: int, seed: int, num_epochs: int) -> Both:
    """One training on ranks and in one process; Local SGD with period 1 stands for DDP there."""
    is_parallel = (method, period) == ("Local SGD", 1)
    strategy = DDPStrategy(**PROCESSES) if is_parallel else STRATEGIES[method](period)
    models, _ = train(strategy, SKEWS[shards], seed, num_epochs)
    other = simulated(method, shards, period, seed, num_epochs, NUM_RANKS)
    return Both(method, shards, period, seed, *evaluate(models), simulated_loss=other.loss)


def run_all(periods: Sequence[int], num_seeds: int, num_epochs: int) -> list[Both]:
    """Every method with every period on both kinds of shards, and DDP."""
    settings = list(product(METHODS, SKEWS, periods))
    settings += [("Local SGD", shards, 1) for shards in SKEWS]
    return [
        run(*setting, seed, num_epochs)
        for setting, seed in track(list(product(settings, range(num_seeds))), transient=True)
    ]


def be_quiet() -> None:
    """Let the table be seen; and more threads than one would only wait for each other at this size."""
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")


def main() -> None:
    """Train, print the table, keep the numbers."""
    options = arguments(
        "Overlap-Local-SGD on four ranks, on digits.",
        "overlap_local_sgd_ranks",
        quick="one period, one seed, one epoch",
        seeds=2,
    ).parse_args()
    be_quiet()
    full, quick = (PERIODS, options.seeds, NUM_EPOCHS), (PERIODS[:1], 1, 1)
    runs = run_all(*(quick if options.quick else full))
    options.output.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(asdict(run)) for run in runs)
    (options.output / "overlap_local_sgd_ranks.json").write_text(f"[\n{lines}\n]\n")
    table = as_table(runs)
    Console().print(table)
    save_table(options.output / "overlap_local_sgd_ranks.md", table)
    apart = max(abs(run.loss - run.simulated_loss) for run in runs)
    print(f"Largest difference of a loss from that in one process: {apart:.1g}")
    print(f"Written to {options.output}")


if __name__ == "__main__":
    main()
