"""What ByzantineStrategy is for: trainings with wrong ranks end where those without end, beside DDP, which does not."""

from __future__ import annotations

import math

import pytest
import torch
from support.strategy_training import FORK, Run, ddp
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Sampler, TensorDataset

import lightning_sgd
from lightning_sgd import ALIE, IPM, BitFlip, GaussianAttack, LabelFlip, Mean, Mimic

pytestmark = [
    pytest.mark.timeout(90),
    pytest.mark.filterwarnings(
        "ignore:You defined a `validation_step` but have no `val_dataloader`"
    ),
]
NUM_RANKS, WRONG, NUM_STEPS = 4, 3, 120


class Digits(lightning_sgd.DigitsClassifier):
    """One rank multiplies its loss, or flips its labels."""

    def __init__(self, factor=1.0, flips=False, momentum=0.0):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            super().__init__(hidden_sizes=[32])
        self.factor, self.flips, self.momentum = factor, flips, momentum

    def training_step(self, batch):
        images, labels = batch
        is_wrong = self.global_rank == WRONG
        labels = LabelFlip(10)(labels) if is_wrong and self.flips else labels
        return (self.factor if is_wrong else 1.0) * cross_entropy(self(images), labels)

    def configure_optimizers(self):
        # With DDP the momentum of all is that of the mean.
        return torch.optim.SGD(self.parameters(), 0.5, self.momentum, dampening=self.momentum)


class Drawn(Sampler):
    """With replacement, from a generator of this rank."""

    def __init__(self, length, num_samples):
        self.length, self.num_samples = length, num_samples

    def __iter__(self):
        is_alone = not torch.distributed.is_initialized()
        seed = 0 if is_alone else torch.distributed.get_rank()
        generator = torch.Generator().manual_seed(seed)
        return iter(torch.randint(self.length, (self.num_samples,), generator=generator).tolist())

    def __len__(self):
        return self.num_samples


def images():
    data = lightning_sgd.DigitsDataModule()
    data.setup("fit")
    data.setup("test")
    return TensorDataset(*data.train_set[:]), TensorDataset(*data.test_set[:])


def accuracy(module):
    x, y = images()[1][:]
    with torch.no_grad():
        return float((module(x).argmax(dim=1) == y).float().mean())


def train(folder, strategy, module, *, ranks=NUM_RANKS, num_steps=NUM_STEPS, batch=32, **settings):
    train_set = images()[0]
    loader = DataLoader(train_set, batch, sampler=Drawn(len(train_set), batch * num_steps))
    settings = {"max_epochs": 1, "use_distributed_sampler": False, **settings}
    try:
        run = Run(folder, strategy, module, ranks=ranks, data=loader, **settings)
    except Exception as error:
        if "no worker has a finite gradient" not in str(error):
            raise
        return 0.0
    return accuracy(run.module)


def byzantine(rule="filter", **settings):
    f = 1 if rule == "filter" else 0
    return lightning_sgd.ByzantineStrategy(rule, f, worker_momentum=0.9, **{**FORK, **settings})


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Accuracy of DDP without a wrong rank."""
    return train(tmp_path_factory.mktemp("plain"), ddp(), Digits(momentum=0.9))


FAULTS = {
    "sign flip × 100": {"factor": -100.0},
    "NaN": {"factor": math.nan},
    "infinity": {"factor": math.inf},
    "label flip": {"flips": True},
}
DRILLS = {
    "ALIE": ALIE(1.5),
    "IPM": IPM(5.0),
    "Gaussian": GaussianAttack(std=10.0),
    "mimic": Mimic(),
    "bit flip": BitFlip(num_coordinates=100),
}
HARMLESS_TO_THE_MEAN = ("label flip", "ALIE", "mimic")


@pytest.mark.parametrize("name", [*FAULTS, *DRILLS])
def test_with_one_of_four_ranks_wrong_the_filter_trains_as_if_there_were_none(
    tmp_path, undisturbed, name
):
    attack = {"attack": DRILLS[name], "byzantine_ranks": [WRONG]} if name in DRILLS else {}
    fault = FAULTS.get(name, {})
    assert undisturbed > 0.9
    assert train(tmp_path, byzantine(**attack), Digits(**fault)) > undisturbed - 0.02


@pytest.mark.parametrize("name", [n for n in (*FAULTS, *DRILLS) if n not in HARMLESS_TO_THE_MEAN])
def test_beside_it_the_mean_fails(tmp_path, name):
    if name in FAULTS:
        reached = train(tmp_path, ddp(), Digits(**FAULTS[name], momentum=0.9))
    else:
        attack = {"attack": DRILLS[name], "byzantine_ranks": [WRONG]}
        reached = train(tmp_path, byzantine(Mean(0), **attack), Digits())
    assert reached < 0.5


@pytest.mark.slow
def test_64_workers_on_one_device(tmp_path):
    # A quarter of the micro-batches of every step sends five times the mean of the others, backwards.
    def reached(rule, folder):
        strategy = lightning_sgd.ByzantineStrategy(
            rule,
            16,
            workers="micro_batch",
            attack=IPM(5.0),
            byzantine_ranks=list(range(48, 64)),
            **FORK,
        )
        settings = {"ranks": 1, "num_steps": 64 * 30, "batch": 8, "accumulate_grad_batches": 64}
        return train(tmp_path / folder, strategy, Digits(), **settings)

    assert reached("filter", "filter") > 0.8
    assert reached(Mean(16), "mean") < 0.5
