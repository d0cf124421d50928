"""ByzantineStrategy on real processes: the mean is DDP's, wrong ranks do not matter, and what is sent is counted."""

from __future__ import annotations

import pytest
import torch
from support.strategy_training import FORK, Run, ddp, flat, loader, sgd, spread
from support.training import Regression

import lightning_sgd
from lightning_sgd.aggregation import Mean

pytestmark = pytest.mark.timeout(60)


def byzantine(*args, **settings):
    return lightning_sgd.ByzantineStrategy(*args, **{**FORK, **settings})


def finals(run):
    return [record["final"] for record in run.ranks]


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_the_mean_is_what_ddp_does(tmp_path, num_ranks):
    ours = Run(tmp_path / "ours", byzantine(Mean()), ranks=num_ranks, data=None)
    theirs = Run(tmp_path / "theirs", ddp(), ranks=num_ranks)
    for mine, expected in zip(ours.trace, theirs.trace, strict=True):
        torch.testing.assert_close(mine[0], expected[0], rtol=1e-6, atol=1e-6)
        assert spread(mine) == 0.0
