"""What the base of all monitors promises, on a monitor that does what it can to break it."""

from __future__ import annotations

import logging
import random
from functools import partial

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from support.training import Regression, batches, trainer

from lightning_sgd.callbacks._monitoring.monitor import Monitor


class Gambler(Monitor):
    """Draws from every global source of random numbers, and fails at the look that it is told to."""

    def __init__(self, fails_at=None):
        super().__init__(every_n_steps=2, every_n_epochs=None, max_overhead=None)
        self.fails_at, self.looks = fails_at, []

    def look(self, trainer, pl_module):
        torch.rand(3), np.random.rand(3), random.random()  # noqa: NPY002  # must be undone
        self.looks.append((trainer.global_step, torch.is_grad_enabled()))
        if len(self.looks) == self.fails_at:
            raise RuntimeError("lost")
        return {"gambler/luck": 1.0}

    def describe_start(self, trainer, pl_module):
        return "luck"

    def describe_end(self, trainer, pl_module):
        return "luck"


def states():
    """Hashable copies of all global random states."""
    numbers = np.random.get_state()  # noqa: NPY002  # the global one is meant
    return bytes(torch.get_rng_state()), numbers[1].tobytes(), numbers[2:], random.getstate()


@pytest.mark.parametrize("fails_at", [None, 1, 3])
def test_random_states_are_kept_also_when_a_look_fails(tmp_path, monkeypatch, fails_at):
    seen, tick = [], Monitor._look_if_affordable

    def watched(self, *args, **kwargs):
        before = states()
        try:
            tick(self, *args, **kwargs)
        finally:
            seen.append(before == states())

    monkeypatch.setattr(Monitor, "_look_if_affordable", watched)
    run = trainer(tmp_path, callbacks=[Gambler(fails_at)], max_epochs=1)
    if fails_at is None:
        run.fit(Regression(partial(torch.optim.SGD, lr=0.1)), batches())
    else:
        with pytest.raises(RuntimeError, match="lost"):
            run.fit(Regression(partial(torch.optim.SGD, lr=0.1)), batches())
    assert seen == [True] * (fails_at or 5)


def test_it_looks_at_the_start_in_between_and_at_the_end_without_gradients(tmp_path):
    monitor = Gambler()
    trainer(tmp_path, callbacks=[monitor], max_steps=9, max_epochs=-1).fit(
        Regression(torch.optim.SGD), batches()
    )
    assert monitor.looks == [(step, False) for step in (0, 2, 4, 6, 8, 9)]


def test_a_checkpoint_read_for_a_test_does_not_reach_into_the_next_fit(tmp_path):
    # Its state would make the next training begin in the middle of the last one's schedule.
    class Tested(Regression):
        def test_step(self, batch, batch_idx):
            pass

    monitor, module = Gambler(), Tested(partial(torch.optim.SGD, lr=0.1))
    run = trainer(tmp_path, callbacks=[monitor], max_epochs=1)
    run.fit(module, batches())
    run.save_checkpoint(tmp_path / "end.ckpt")
    run.test(module, batches(), ckpt_path=tmp_path / "end.ckpt", verbose=False)
    monitor.looks.clear()
    trainer(tmp_path, callbacks=[monitor], max_epochs=1).fit(module, batches())
    assert [step for step, _ in monitor.looks] == [0, 2, 4, 6, 7]


class Clock(Callback):
    """Makes every batch take one second, on a clock that stands still otherwise.

    Args:
        monkeypatch: Puts the clock in place.
    """

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(
            "lightning_sgd.callbacks._monitoring.monitor.time.perf_counter", lambda: self.now
        )

    def on_train_batch_start(self, *args):
        self.now += 1.0


class Slow(Monitor):
    """A full look takes four eighths of a second, a cheap one an eighth."""

    def __init__(self, clock, max_overhead=1 / 8 / 0.8, has_cheap_look=True):
        super().__init__(1, None, max_overhead, full_every=10)
        self.clock, self.looks, self.cheap_looks = clock, [], []
        self.schedule.has_cheap_look = has_cheap_look

    def look(self, trainer, pl_module):
        self.clock.now += 4 / 8
        self.looks.append(trainer.global_step)
        return {"slow/all": 1.0, "slow/cheap": 1.0}

    def cheap_look(self, trainer, pl_module):
        self.clock.now += 1 / 8
        self.cheap_looks.append(trainer.global_step)
        return {"slow/cheap": 1.0}

    def describe_start(self, trainer, pl_module):
        return "slow"

    def describe_end(self, trainer, pl_module):
        return "slow"


def fit(tmp_path, monitor, max_steps, **settings):
    run = trainer(
        tmp_path, callbacks=[monitor.clock, monitor], max_steps=max_steps, max_epochs=-1, **settings
    )
    run.fit(Regression(partial(torch.optim.SGD, lr=0.1)), batches())
    return run


def test_the_first_look_is_paid_back_before_the_next(tmp_path, monkeypatch, caplog):
    # With one eighth of the time planned for looking: the numbers of the schedule's own test.
    monitor = Slow(Clock(monkeypatch))
    with caplog.at_level(logging.INFO):
        fit(tmp_path, monitor, 25)
    assert monitor.looks == [0, 14, 24]
    assert monitor.cheap_looks == [4, 6, 7, 8, 10, 12, 15, 16, 18, 20, 22, 25]
    assert monitor.state_dict()["seconds"] == 25.0
    expected = "slow, every step, 500.0 ms for a full look, at most 15.6% of the time, which pays"
    assert f"Slow: {expected} for the next look after 4 s; values go to no logger." in caplog.text


def test_without_cheap_looks_only_full_looks_are_made(tmp_path, monkeypatch):
    monitor = Slow(Clock(monkeypatch), has_cheap_look=False)
    fit(tmp_path, monitor, 25)
    assert (monitor.looks, monitor.cheap_looks) == ([0, 8, 12, 16, 20, 24], [])


def test_without_a_limit_every_look_is_full(tmp_path, monkeypatch):
    monitor = Slow(Clock(monkeypatch), max_overhead=None)
    fit(tmp_path, monitor, 9)
    assert (monitor.looks, monitor.cheap_looks) == (list(range(10)), [])


def test_the_last_look_is_full_if_there_is_enough_and_logs_only_what_is_new(tmp_path, monkeypatch):
    # The cheap look after the last step says nothing of what the full look is made for.
    logger = CSVLogger(tmp_path, name="", version="")
    clock = Clock(monkeypatch)
    monitor = Slow(clock, max_overhead=1.0)
    fit(tmp_path, monitor, 5, logger=logger, log_every_n_steps=1)
    assert (monitor.looks, monitor.cheap_looks) == ([0, 5], [1, 2, 3, 4, 5])
    rows = np.genfromtxt(tmp_path / "metrics.csv", delimiter=",", names=True, deletechars="")
    cheap = rows["step"][~np.isnan(rows["slow/cheap"])]
    full = rows["step"][~np.isnan(rows["slow/all"])]
    assert (cheap.tolist(), full.tolist()) == ([0, 0, 1, 2, 3, 4], [0, 4])


def test_what_has_been_spent_is_in_the_checkpoint(tmp_path, monkeypatch):
    # Otherwise each restart would begin with an empty purse, or a full one.
    clock = Clock(monkeypatch)
    first = Slow(clock)
    run = fit(tmp_path, first, 14)
    run.save_checkpoint(tmp_path / "middle.ckpt")
    second = Slow(clock)
    run = trainer(tmp_path, callbacks=[clock, second], max_steps=25, max_epochs=-1)
    module = Regression(partial(torch.optim.SGD, lr=0.1))
    run.fit(module, batches(), ckpt_path=tmp_path / "middle.ckpt")
    assert second.looks == [24]
    assert second.cheap_looks == [15, 16, 18, 20, 22, 25]
