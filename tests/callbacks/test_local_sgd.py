"""CommunicationMonitor against hand-counted bytes, and against NumPy on the weights of every rank."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from support.strategy_training import FORK, Run, ddp

from lightning_sgd import CommunicationMonitor, LocalSGDStrategy
from lightning_sgd.callbacks.communication_monitor.communication_monitor import traffic_table
from lightning_sgd.callbacks.communication_monitor.traffic_source import find_source
from lightning_sgd.functional.distributed.consensus import consensus_distance
from lightning_sgd.functional.distributed.traffic import Traffic, blocked_share

pytestmark = pytest.mark.timeout(60)
NUM_STEPS, NUM_PARAMS = 14, 4 * 8 + 8 + 8 + 1


def run(folder, strategy, *callbacks, ranks=2):
    logger = CSVLogger(folder / "log", name="", version="") if callbacks else False
    return Run(
        folder, strategy, ranks=ranks, callbacks=callbacks, logger=logger, log_every_n_steps=0
    )


def monitor(**settings):
    return CommunicationMonitor(**{"every_n_steps": 1, "max_overhead": None, **settings})


def logged(folder):
    """By key, the values in the order of steps."""
    rows = np.genfromtxt(folder / "log/metrics.csv", delimiter=",", names=True, deletechars="")
    # The first row is the look before the first step.
    return {key.removeprefix("comm/"): rows[key][1:] for key in rows.dtype.names if "/" in key}


@pytest.mark.parametrize("ranks", [2, 4])
def test_counts_of_local_sgd_are_those_of_the_rounds(tmp_path, ranks):
    # A round sends 2(n − 1) parts, an n-th each, of 49 parameters and a tag of two numbers.
    run(tmp_path, LocalSGDStrategy(period=3, **FORK), monitor(), ranks=ranks)
    values = logged(tmp_path)
    due = np.array([step % 3 == 0 for step in range(1, NUM_STEPS + 1)])
    parts = 2 * (ranks - 1)
    sent = due * parts * 4 * (NUM_PARAMS + 2) / ranks
    np.testing.assert_allclose(values["bytes_per_step"], sent)
    np.testing.assert_allclose(values["messages_per_step"], due * parts)
    assert ((values["blocked_seconds_per_step"] > 0) == due).all()
    assert (values["blocked_share"] <= 1).all()


def test_the_distance_is_that_of_the_weights(tmp_path):
    result = run(tmp_path, LocalSGDStrategy(period=3, **FORK), monitor())
    expected = []
    for weights in result.trace:
        models = torch.stack(weights).double().numpy()
        expected.append(np.sqrt(((models - models.mean(axis=0)) ** 2).sum(axis=1).mean()))
    found = logged(tmp_path)["consensus_distance"]
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert (found[2::3] == 0).all(), "right after an average"
    assert (found[::3] > 0).all()


@pytest.mark.parametrize("make", [lambda: LocalSGDStrategy(period=3, **FORK), ddp])
def test_ranks_train_the_same_with_it_and_without(tmp_path, make):
    with_it = run(tmp_path / "with", make(), monitor(), ranks=4)
    without = run(tmp_path / "without", make(), ranks=4)
    for ours, plain in zip(with_it.trace, without.trace, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))
    assert all(
        torch.equal(a["final"], b["final"])
        for a, b in zip(with_it.ranks, without.ranks, strict=True)
    )


def test_bytes_of_ddp_are_those_of_its_gradients_and_the_rest_is_not_known(tmp_path):
    run(tmp_path, ddp(), monitor())
    values = logged(tmp_path)
    np.testing.assert_allclose(values["bytes_per_step"], 4 * NUM_PARAMS)  # 2(n − 1)/n is 1
    assert np.isnan(values["messages_per_step"]).all()
    assert np.isnan(values["blocked_seconds_per_step"]).all()
    assert (values["consensus_distance"] == 0).all()
    assert "not known" in (tmp_path / "log/communication.md").read_text()


def test_nothing_is_lost_between_looks_and_the_distance_comes_as_often_as_asked(tmp_path):
    watch = monitor(every_n_steps=5, distance_every_n_looks=2)
    run(tmp_path, LocalSGDStrategy(period=3, **FORK), watch)
    values = logged(tmp_path)  # after steps 5, 10 and 14: rounds 3; 6, 9; 12
    sent = 4 * (NUM_PARAMS + 2)
    np.testing.assert_allclose(values["bytes_per_step"], [sent / 5, 2 * sent / 5, sent / 4])
    assert np.isnan(values["consensus_distance"]).tolist() == [True, False, True]
    first, second = (tmp_path / "log/communication.md").read_text().splitlines()[2:]
    assert first.startswith(f"| 0 | 14 | {4 * sent / 1e6:.4g} |")
    assert second.startswith("| 1 | 14 |")


def test_what_a_strategy_hides_is_said(tmp_path):
    strategy = SimpleNamespace(model=torch.nn.Linear(1, 1))
    source = find_source(SimpleNamespace(world_size=2, strategy=strategy))
    assert "SimpleNamespace sends cannot be known" in source.description
    assert math.isnan(source.read().num_bytes)


def test_an_impossible_interval_is_refused():
    with pytest.raises(ValueError, match="`distance_every_n_looks` to be at least 0, got -1"):
        CommunicationMonitor(distance_every_n_looks=-1)


def test_arithmetic_by_hand():
    # Models 0 and 6 are 3 from their mean; one of three at 0, 0, 3: mean 1, squares 1, 1, 4.
    assert consensus_distance([9.0, 9.0]) == 3.0
    assert consensus_distance([1.0, 1.0, 4.0]) == pytest.approx(math.sqrt(2))
    assert blocked_share(Traffic(seconds=1.0), 4.0) == 0.25
    assert blocked_share(Traffic(), 0.0) == 0.0
    table = traffic_table([(Traffic(math.nan, math.nan, math.nan, 3), 1.0)])
    assert table.splitlines()[-1].count("not known") == 6
