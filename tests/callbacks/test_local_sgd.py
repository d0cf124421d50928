"""CommunicationMonitor against hand-counted bytes, and against NumPy on the weights of every rank."""

from __future__ import annotations

import csv
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from support.strategy_training import FORK, Run, ddp, sgd
from support.training import Regression, TwoOptimizers

from lightning_sgd import CommunicationMonitor, LocalSGDStrategy
from lightning_sgd.callbacks.communication_monitor.communication_monitor import (
    COUNTS,
    traffic_table,
)
from lightning_sgd.callbacks.communication_monitor.traffic_source import find_source
from lightning_sgd.functional.distributed.flat_buffers import consensus_distance
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


class Losses(Regression):
    """Logs its loss, as users do."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss)
        return loss


def rows_of(folder):
    """By key, the steps at which the file has values."""
    with (folder / "log/metrics.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    keys = rows[0].keys() - {"step", "epoch"}
    return {key: [int(row["step"]) for row in rows if row[key]] for key in keys}


def test_a_loss_and_what_the_same_step_sent_stand_beside_each_other(tmp_path):
    logger = CSVLogger(tmp_path / "log", name="", version="")
    watch = monitor(every_n_steps=2)
    settings = {"callbacks": [watch], "logger": logger, "log_every_n_steps": 2}
    Run(tmp_path, LocalSGDStrategy(period=1, **FORK), Losses(sgd), **settings)
    found = rows_of(tmp_path)
    every_other = list(range(1, NUM_STEPS, 2))  # Lightning counts steps from 0
    assert found["loss"] == every_other
    assert found["comm/bytes_per_step"] == every_other, "by the strategy"
    assert found["comm/blocked_share"] == every_other, "by the monitor"
    assert found["comm/consensus_distance"] == [0, *every_other], "and before the first step"


@pytest.mark.parametrize(("every", "writer"), [(1, "the strategy"), (0, "the monitor")])
def test_one_number_has_one_key(tmp_path, every, writer):
    logger = CSVLogger(tmp_path / "log", name="", version="")
    settings = {"callbacks": [monitor()], "logger": logger, "log_every_n_steps": every}
    result = Run(tmp_path, LocalSGDStrategy(period=1, **FORK), **settings)
    found = rows_of(tmp_path)
    assert len(found["comm/bytes_per_step"]) == NUM_STEPS, f"only {writer} logs them"
    assert not [key for key in found if key.startswith("communication/")]
    last = result.ranks[0]["metrics"][-1]
    names = {key.removeprefix("comm/") for key in found if key.startswith("comm/")}
    assert names == {*COUNTS, "blocked_share", "consensus_distance"}
    assert {f"communication/{name}" for name in names} <= set(last), "readable as before"
    assert last["communication/bytes_per_step"] == 4 * (NUM_PARAMS + 2)


class TwoSteps(TwoOptimizers):
    """Steps both optimizers in every batch."""

    def training_step(self, batch, batch_idx):
        super().training_step(batch, 1)


def test_a_step_is_a_batch_however_many_optimizers_it_has(tmp_path):
    watch = monitor(every_n_steps=4)  # optimizer steps, two of which are a batch
    logger = CSVLogger(tmp_path / "log", name="", version="")
    settings = {"callbacks": [watch], "logger": logger, "log_every_n_steps": 0}
    Run(tmp_path, ddp(), TwoSteps(sgd), **settings)
    values = logged(tmp_path)
    assert len(values["bytes_per_step"]) == NUM_STEPS // 2
    np.testing.assert_allclose(values["bytes_per_step"], 4 * NUM_PARAMS)
    first, _ = (tmp_path / "log/communication.md").read_text().splitlines()[2:]
    assert first.startswith(f"| 0 | {NUM_STEPS} | {NUM_STEPS * 4 * NUM_PARAMS / 1e6:.4g} |")


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
