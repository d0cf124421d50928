"""ByzantineMonitor on real processes: the wrong rank is named with its host, and nothing is changed."""

from __future__ import annotations

import socket
from functools import partial

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from support.rank_processes import run_as_torchrun
from support.strategy_training import FORK, NUM_BATCHES, Run, loader, sgd
from support.training import Regression, trainer

from lightning_sgd import ByzantineMonitor, ByzantineStrategy, NonFinite, SignFlip

pytestmark = pytest.mark.timeout(60)
HOST = socket.gethostname()


def strategy(*args, **settings):
    drill = {"attack": SignFlip(), "byzantine_ranks": [3]}
    return ByzantineStrategy(*args, **{**FORK, **drill, **settings})


def monitor(**settings):
    defaults = {"every_n_steps": 1, "max_overhead": None, "alarm_share": None}
    return ByzantineMonitor(**{**defaults, **settings})


def logged(folder):
    """By key, the values in the order of steps."""
    rows = np.genfromtxt(folder / "log/metrics.csv", delimiter=",", names=True, deletechars="")
    return {name.removeprefix("byzantine/"): rows[name] for name in rows.dtype.names}


def run(folder, of, *callbacks, **settings):
    logger = CSVLogger(folder / "log", name="", version="")
    settings = {"ranks": 4, "logger": logger, "log_every_n_steps": 0, **settings}
    return Run(folder, of, callbacks=callbacks, **settings)


class Large(Callback):
    """One rank's gradient is large, whatever it computes."""

    def on_after_backward(self, trainer, pl_module):
        if trainer.global_rank == 3:
            for param in pl_module.parameters():
                param.grad *= -100


@pytest.mark.parametrize("rule", ["filter", "krum", "median", "nnm+trmean"])
def test_the_wrong_rank_stands_out_in_what_is_logged(tmp_path, rule):
    num_byzantine = 0 if rule == "krum" else 1
    of = ByzantineStrategy(rule, num_byzantine, **FORK)
    run(tmp_path, of, Large(), monitor())
    values = logged(tmp_path)
    for rank in range(3):
        steps = slice(1, None)
        assert (values[f"distance/rank_{rank}"][steps] < values["distance/rank_3"][steps]).all()
        assert values[f"rejected/rank_{rank}"][-1] < 0.5
    if rule == "filter":
        weights = np.stack([values[f"weight/rank_{rank}"][1:] for rank in range(4)])
        np.testing.assert_allclose(weights.sum(axis=0), 1.0)
        assert (weights[3] == 0).all()
    if rule == "median":
        assert np.isnan(values["weight/rank_0"]).all()
    assert values["rejected/rank_3"][-1] > 0.9
    assert (values["num_rejected"][1:] >= 1).all()


def test_training_is_unchanged(tmp_path):
    plain = run(tmp_path / "plain", strategy("filter", 1))
    watched = run(tmp_path / "watched", strategy("filter", 1), monitor())
    for ours, expected in zip(watched.ranks, plain.ranks, strict=True):
        assert all(map(torch.equal, ours["trace"], expected["trace"]))


def fit(folder, of, callback, ranks=4):
    """What a rank of torchrun does, with what the monitor says at the end."""

    def work(rank):
        quiet = trainer(folder, devices=ranks, strategy=of(), callbacks=[callback],
                        use_distributed_sampler=False)  # fmt: skip
        module = Regression(sgd)
        try:
            quiet.fit(module, loader(ranks))
        except UserWarning as warning:  # warnings are errors here
            return str(warning)
        return callback.describe_end(quiet, module)

    return work


def nonfinite():
    settings = {"attack": NonFinite(), "byzantine_ranks": [3], **FORK, "start_method": "popen"}
    return ByzantineStrategy("filter", 1, **settings)


def test_the_line_at_the_end_names_rank_host_and_share(tmp_path):
    outcomes = run_as_torchrun(fit(tmp_path, nonfinite, monitor()), 4, tmp_path)
    steps = 2 * NUM_BATCHES
    expected = f"rank 3 on host {HOST} was rejected in 100 % of steps, of the {steps} that show it."
    assert [outcome.result for outcome in outcomes] == [expected] * 4, outcomes[0].error


def test_an_alarm_is_raised_once_a_rank_is_rejected_in_most_steps(tmp_path):
    callback = monitor(alarm_share=0.5, horizon=5)
    outcomes = run_as_torchrun(fit(tmp_path, nonfinite, callback), 4, tmp_path)
    expected = f"rank 3 on host {HOST} was rejected in 100 % of the last 5 steps. Look at its data,"
    assert str(outcomes[0].result).startswith(expected)


def test_honest_ranks_raise_no_alarm(tmp_path):
    # With two samples per batch the filter takes one for an outlier now and then, but no rank most of the time.
    of = partial(ByzantineStrategy, "filter", 1, **{**FORK, "start_method": "popen"})
    outcomes = run_as_torchrun(fit(tmp_path, of, monitor(alarm_share=0.5, horizon=5)), 4, tmp_path)
    assert "Look at its data" not in str(outcomes[0].result), outcomes[0].error


def test_micro_batches_are_named_too(tmp_path):
    of = ByzantineStrategy(
        "filter", 1, workers="micro_batch", attack=SignFlip(), byzantine_ranks=[2], **FORK
    )
    settings = {"ranks": 1, "accumulate_grad_batches": 5, "limit_train_batches": 5}
    run(tmp_path, of, monitor(), **settings)
    values = logged(tmp_path)
    assert {f"weight/micro_batch_{index}" for index in range(5)} <= set(values)
    total = sum(values[f"weight/micro_batch_{index}"][-1] for index in range(5))
    assert total == pytest.approx(1.0)


def test_ranks_of_several_micro_batches_are_summed_up(tmp_path):
    of = ByzantineStrategy("filter", 2, workers="both", attack=NonFinite(), byzantine_ranks=[1],
                           **FORK)  # fmt: skip
    settings = {"accumulate_grad_batches": 2, "limit_train_batches": 6}
    run(tmp_path, of, monitor(), **settings)
    values = logged(tmp_path)
    assert values["rejected/rank_1"][-1] == 1.0
    assert values["weight/rank_1"][-1] == 0.0
    assert sum(values[f"weight/rank_{rank}"][-1] for rank in range(4)) == pytest.approx(1.0)
    assert values["num_rejected"][-1] == 1.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alarm_share": 0.0}, r"Expected `alarm_share` to be in \(0, 1\], got 0.0"),
        ({"horizon": 0}, "Expected `horizon` to be at least 1"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        monitor(**settings)
