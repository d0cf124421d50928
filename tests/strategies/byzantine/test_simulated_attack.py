"""Simulated attacks: replicas stay equal under each, and attackers alone are replaced."""

from __future__ import annotations

import pytest
import torch
from support.byzantine_training import (
    byzantine,
)
from support.strategy_training import (
    Run,
    spread,
)

from lightning_sgd import (
    ALIE,
    IPM,
    BitFlip,
    ConstantAttack,
    GaussianAttack,
    Mimic,
    NonFinite,
    SignFlip,
)
from lightning_sgd.strategies.byzantine.simulated_attack import SimulatedAttack

pytestmark = [
    pytest.mark.timeout(60),
    pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning"),
]


@pytest.mark.parametrize("rule", ["filter", "nnm+trmean", "cclip"])
@pytest.mark.parametrize(
    "attack",
    [
        SignFlip(),
        SignFlip(omniscient=True),
        ConstantAttack(-50.0),
        NonFinite(),
        ALIE(1.5),
        IPM(0.5),
        GaussianAttack(std=10.0),
        Mimic(),
        BitFlip(3, 7),
    ],
    ids=lambda attack: f"{type(attack).__name__}-{attack.scope}",
)
def test_replicas_stay_equal_under_every_attack(tmp_path, rule, attack):
    strategy = byzantine(rule, 1, attack=attack, byzantine_ranks=[1], worker_momentum=0.9)
    run = Run(tmp_path, strategy, ranks=4, max_epochs=1)
    for weights in run.trace:
        assert spread(weights) == 0.0
        assert weights[0].isfinite().all()
    assert not torch.equal(run.trace[-1][0], run.trace[0][0])


def test_an_attack_that_knows_whole_rows_is_refused_between_ranks():
    from lightning_sgd.aggregation import MinMax

    with pytest.raises(ValueError, match="Try it with micro-batches as workers on one device"):
        SimulatedAttack(MinMax(), [0], num_ranks=2)
    SimulatedAttack(MinMax(), [0], num_ranks=1)


def test_simulated_attacks_replace_the_rows_of_attackers_alone():
    rows = torch.arange(12.0).view(6, 2)  # three ranks with two micro-batches each
    attacked = SimulatedAttack(SignFlip(omniscient=True), [1], 3).on_columns(rows, shard=0, step=0)
    honest = torch.cat([rows[:2], rows[4:]])
    assert torch.equal(attacked[[0, 1, 4, 5]], honest)
    assert torch.equal(attacked[2:4], -honest.mean(dim=0).expand(2, -1))
    honest_sender = SimulatedAttack(SignFlip(), [1], 3)
    assert torch.equal(honest_sender.on_sender(rows, 1, 0), -rows)
    assert honest_sender.on_sender(rows, 0, 0) is rows
    assert honest_sender.on_columns(rows, 0, 0) is rows
