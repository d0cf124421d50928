"""What the base of all monitors promises, on a monitor that does what it can to break it."""

from __future__ import annotations

import random
from functools import partial

import numpy as np
import pytest
import torch
from support.training import Regression, batches, trainer

from lightning_sgd.callbacks._monitor import Monitor


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

    def announce(self, trainer, pl_module):
        return "luck"

    def conclude(self, trainer, pl_module):
        return "luck"


def states():
    """Hashable copies of all global random states."""
    numbers = np.random.get_state()  # noqa: NPY002  # the global one is meant
    return bytes(torch.get_rng_state()), numbers[1].tobytes(), numbers[2:], random.getstate()


@pytest.mark.parametrize("fails_at", [None, 1, 3])
def test_random_states_are_kept_also_when_a_look_fails(tmp_path, monkeypatch, fails_at):
    seen, tick = [], Monitor._tick

    def watched(self, *args):
        before = states()
        try:
            tick(self, *args)
        finally:
            seen.append(before == states())

    monkeypatch.setattr(Monitor, "_tick", watched)
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
