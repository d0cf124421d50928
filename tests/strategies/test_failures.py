"""Ranks that raise, are killed, stopped, or run out of data: nobody waits longer than the timeout, and all know why."""

from __future__ import annotations

import os
import re
import signal
import time
from datetime import timedelta

import pytest
import torch
from lightning.pytorch.callbacks import OnExceptionCheckpoint
from support.rank_processes import run_as_torchrun
from support.strategy_training import flat, loader, samples, sgd
from support.training import Regression, trainer
from torch.utils.data import DataLoader, IterableDataset

from lightning_sgd.strategies._base.checkpoint_format import KEY

pytestmark = pytest.mark.timeout(90)
TIMEOUT = 6.0


class Failing(Regression):
    """Something happens to one rank at one step.

    Args:
        happens: Called on that rank.
        rank: Which one.
        step: Number of the step, counted from 0.
    """

    def __init__(self, happens, rank=1, step=4):
        super().__init__(sgd)
        self.happens, self.rank, self.step = happens, rank, step

    def training_step(self, batch, batch_idx):
        if (self.global_rank, self.global_step) == (self.rank, self.step):
            self.happens()
        return super().training_step(batch, batch_idx)


def raises():
    raise ValueError("the data are gone")


def killed():
    os.kill(os.getpid(), signal.SIGKILL)


def stopped():
    os.kill(os.getpid(), signal.SIGSTOP)


def train(make, folder, module, data=None, ranks=2, timeout=TIMEOUT, every=1, **settings):
    """What one rank does; returns its weights and what the strategy counted."""

    def work(rank):
        strategy = make(
            start_method="popen",
            timeout=timedelta(seconds=timeout),
            sigterm_every_n_batches=every,
        )
        quiet = trainer(
            folder,
            devices=ranks,
            strategy=strategy,
            **{"use_distributed_sampler": False, "max_epochs": 3, **settings},
        )
        quiet.fit(module, loader(ranks) if data is None else data)
        return flat(module), strategy.exchange.traffic.seconds

    return work


@pytest.mark.compatible("a rank that raises")
def test_a_rank_that_raises_is_named_by_all_others(make, tmp_path):
    work = train(make, tmp_path, Failing(raises), ranks=4)
    outcomes = run_as_torchrun(work, 4, tmp_path)
    assert outcomes[1].error == "ValueError: the data are gone"
    for rank in (0, 2, 3):
        assert "Rank 1 raised ValueError: the data are gone." in outcomes[rank].error
        assert outcomes[rank].seconds < outcomes[1].seconds + TIMEOUT


@pytest.mark.compatible("a rank that raises")
def test_rank_0_keeps_the_store_and_is_named_too(make, tmp_path):
    outcomes = run_as_torchrun(train(make, tmp_path, Failing(raises, rank=0)), 2, tmp_path)
    assert outcomes[0].error == "ValueError: the data are gone"
    assert "Rank 0 raised ValueError: the data are gone" in outcomes[1].error
    assert outcomes[1].seconds < outcomes[0].seconds + TIMEOUT


@pytest.mark.compatible("a rank that is killed")
def test_a_rank_that_is_killed_is_named(make, tmp_path):
    outcomes = run_as_torchrun(train(make, tmp_path, Failing(killed), ranks=4), 4, tmp_path)
    assert outcomes[1].exit_code == -signal.SIGKILL
    for rank in (0, 2, 3):
        assert "ExchangeError" in outcomes[rank].error
        assert "Rank 1 does not answer" in outcomes[rank].error
        assert outcomes[rank].exit_code == 1


def wake(processes, seconds):
    """Let a stopped rank go on, so many seconds after it has stopped, unless it has ended instead."""
    while processes[1].is_alive() and "T" not in _state(processes[1].pid):
        time.sleep(0.05)
    time.sleep(seconds)
    if processes[1].is_alive():
        os.kill(processes[1].pid, signal.SIGCONT)


def _state(pid):
    with open(f"/proc/{pid}/stat") as file:  # noqa: PTH123  # no file of ours
        return file.read().rsplit(")", 1)[1].split()[0]


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="reads /proc")  # noqa: PTH110
@pytest.mark.compatible("a rank that stands still for seconds")
def test_a_rank_that_stands_still_within_the_timeout_is_waited_for(make, tmp_path):
    work = train(make, tmp_path, Failing(stopped), timeout=20, every=0)
    outcomes = run_as_torchrun(work, 2, tmp_path, meanwhile=lambda ps: wake(ps, 2))
    assert [outcome.error for outcome in outcomes] == ["", ""]
    (first, waited), (second, _) = (outcome.result for outcome in outcomes)
    assert torch.equal(first, second)
    assert waited > 1.5


def bury(processes):
    """Kill the stopped rank when the other one has ended."""
    processes[0].join(30)
    os.kill(processes[1].pid, signal.SIGKILL)


@pytest.mark.compatible("a rank that stands still for seconds")
def test_a_rank_that_stands_still_for_longer_is_given_up(make, tmp_path):
    work = train(make, tmp_path, Failing(stopped), timeout=3, max_epochs=2)
    outcomes = run_as_torchrun(work, 2, tmp_path, meanwhile=bury)
    assert "Rank 1 does not answer: killed, stopped, or out of reach." in outcomes[0].error
    assert outcomes[0].exit_code == 1


class Stream(IterableDataset):
    """Three batches fewer on rank 1."""

    def __iter__(self):
        rank = torch.distributed.get_rank()
        return (samples()[index] for index in range(40 if rank == 0 else 28))


@pytest.mark.parametrize("every", [0, 1])
@pytest.mark.compatible("a rank that runs out of data")
def test_a_rank_that_runs_out_of_data_is_found_out(make, tmp_path, every):
    # With Lightning's own broadcast before every batch, one rank waits there and the other one here.
    data = DataLoader(Stream(), batch_size=4)
    module = Failing(raises, rank=None)
    work = train(make, tmp_path, module, data, every=every, max_epochs=1)
    outcomes = run_as_torchrun(work, 2, tmp_path)
    for outcome in outcomes:
        assert "The ranks are not at the same place" in outcome.error
        where = r"rank 0: \w+ after step [789]; rank 1: (consensus|weights) after step 7"
        assert re.search(where, outcome.error)
        assert "Give every rank the same number of batches" in outcome.error


@pytest.mark.filterwarnings("ignore:.*was called without a model:UserWarning")
@pytest.mark.filterwarnings("ignore:.*there is no last checkpoint available:UserWarning")
@pytest.mark.compatible("OnExceptionCheckpoint")
@pytest.mark.parametrize("rank", [0, 1])
def test_a_checkpoint_on_an_exception_does_not_wait_for_the_failed_rank(make, tmp_path, rank):
    rescue = OnExceptionCheckpoint(tmp_path, filename="rescued")
    work = train(
        make,
        tmp_path,
        Failing(raises, rank=rank),
        callbacks=[rescue],
        enable_checkpointing=True,
    )
    outcomes = run_as_torchrun(work, 2, tmp_path)
    assert all(outcome.exit_code == 1 for outcome in outcomes)
    assert max(outcome.seconds for outcome in outcomes) < TIMEOUT + 5
    saved = torch.load(tmp_path / "rescued.ckpt", weights_only=True)
    assert saved[KEY]["num_ranks"] == 2
    assert len(saved[KEY]["ranks"]) == 1
    assert saved["global_step"] >= 4
