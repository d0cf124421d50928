"""What strategies say and log, and what they refuse before ranks could wait for each other for ever."""

from __future__ import annotations

import csv
import fnmatch
import json

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from support.strategy_training import FORK, Run, flat, sgd
from support.training import Regression, TwoOptimizers

import lightning_sgd
from lightning_sgd import GossipPGAStrategy, SpectralFilter
from lightning_sgd._protocols import CountsTraffic, HasReplicas, ReportsAggregation
from lightning_sgd.functional.distributed.traffic import all_reduce_traffic

pytestmark = pytest.mark.timeout(60)


def run_with_csv(tmp_path, strategy, module=None, ranks=2, **settings):
    """The start line, the rows of metrics by step, and the run."""
    logger = CSVLogger(tmp_path, name="", version="csv")
    run = Run(tmp_path, strategy, module, ranks=ranks, logger=logger, **settings)
    said = json.loads((tmp_path / "csv" / "findings.json").read_text())["plugins"]
    with (tmp_path / "csv" / "metrics.csv").open() as file:
        rows = {int(row["step"]): row for row in csv.DictReader(file)}
    return said[type(strategy).__name__]["start"], rows, run


def test_the_start_message_names_every_key_that_is_logged(make, tmp_path):
    strategy = make()
    start, rows, _ = run_with_csv(tmp_path, strategy, log_every_n_steps=1)
    patterns = start.split("; logs ")[1].removesuffix(" (CSVLogger).").split(", ")
    logged = {key for row in rows.values() for key in row if "/" in key}
    assert logged
    for key in logged:
        assert any(fnmatch.fnmatch(key, pattern) for pattern in patterns), (key, start)
        assert key in strategy.metric_keys


def test_the_start_message_of_the_byzantine_strategy(tmp_path):
    # 40 weights and biases of the first layer, 9 of the second, in float32.
    num_weights = flat(Regression(sgd)).numel()
    strategy = lightning_sgd.ByzantineStrategy(SpectralFilter(0), **FORK)
    start, _, _ = run_with_csv(tmp_path, strategy, ranks=3, log_every_n_steps=1)
    assert start == (
        f"3 ranks, {4 * num_weights / 1e3:.3g} kB of gradients each, combined by SpectralFilter(num_byzantine=0); "
        "logs comm/* (CSVLogger)."
    )


def test_two_optimizers_in_one_batch_count_once(tmp_path):
    # Lightning's `log_every_n_steps` counts batches; the second optimizer steps in every other batch.
    strategy = lightning_sgd.LocalSGDStrategy(period=1, **FORK)
    _, rows, run = run_with_csv(
        tmp_path, strategy, TwoOptimizers(sgd), log_every_n_steps=2, max_epochs=1
    )
    assert sorted(rows) == [1, 3, 5]  # as Lightning counts, the second, fourth and sixth batch
    module = Regression(sgd)
    first, last = (
        all_reduce_traffic(4 * (flat(layer).numel() + 2), 2)[0]
        for layer in (module.net[0], module.net[2])
    )
    # Between two rows the first optimizer steps twice, and the last one once.
    for step in (3, 5):
        assert float(rows[step]["comm/bytes_per_step"]) == (2 * first + last) / 2
    assert run.ranks[0]["replica_steps"] == [7, 3]


def lbfgs(params):
    return torch.optim.LBFGS(params, max_iter=4, line_search_fn="strong_wolfe")


def test_lbfgs_is_refused_before_training(make, tmp_path):
    # Ranks would evaluate it unequally often, and wait for each other until the timeout.
    with pytest.raises(Exception, match=r"once per step with .*, got LBFGS\. Ranks that evaluate"):
        Run(tmp_path, make(), Regression(lbfgs), ranks=1)


class Twice(torch.optim.SGD):
    """Evaluates the closure twice, as sharpness-aware minimisation does."""

    def step(self, closure=None):
        closure()
        return super().step(closure)


def test_an_optimizer_that_evaluates_its_closure_twice_is_refused(make, tmp_path):
    def optimizer(params):
        return Twice(params, lr=0.1)

    with pytest.raises(Exception, match="got a second call of the closure by Twice"):
        Run(tmp_path, make(), Regression(optimizer))


@pytest.mark.filterwarnings("ignore::lightning_sgd.OutsideIntendedUseWarning")
def test_sparse_gradients_are_named_without_quotes():
    table = torch.nn.Embedding(4, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    from lightning_sgd.functional.distributed.flat_gradients import FlatGradients

    with pytest.raises(ValueError, match=r"where they are aggregated, got a sparse one\. Set"):
        FlatGradients([table.weight], 1).pack()


def test_strategies_offer_to_callbacks_what_the_protocols_say(make, plugin):
    strategy = make()
    assert isinstance(strategy, CountsTraffic)
    assert isinstance(strategy, HasReplicas)
    assert isinstance(strategy, ReportsAggregation) == (plugin.name == "ByzantineStrategy")
    assert strategy.traffic is None
    assert list(strategy.replicas) == []


def test_adaptive_periods_are_logged(tmp_path):
    strategy = GossipPGAStrategy("ring", period=2, adaptive=True, **FORK)
    _, rows, _ = run_with_csv(tmp_path, strategy, log_every_n_steps=1)
    logged = {key for row in rows.values() for key, value in row.items() if value and "/" in key}
    assert logged == set(strategy.metric_keys)
