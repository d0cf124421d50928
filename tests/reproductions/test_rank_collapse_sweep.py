"""The sweep shows what the paper claims, and the documentation shows what the sweep gave."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from support.reproductions import load


@pytest.fixture(scope="module")
def sweep(root):
    return load("rank_collapse_sweep")


@pytest.fixture(scope="module")
def saved(root):
    return json.loads((root / "docs/results/rank_collapse_sweep.json").read_text())


def test_measures_are_numpys(sweep):
    torch.manual_seed(0)
    net = sweep.mlp()
    hidden = [layer.weight for layer in net[:-1] if isinstance(layer, torch.nn.Linear)]
    sigmas = [np.linalg.svd(w.detach().double().numpy(), compute_uv=False) for w in hidden]
    shares = [sigma / sigma.sum() for sigma in sigmas]
    measured = sweep.measure(net)
    assert len(hidden) == 3
    effective = np.mean([np.exp(-(p * np.log(p)).sum()) for p in shares])
    assert measured["effective_rank"] == pytest.approx(effective, abs=1e-3)
    above = np.mean([(sigma > 0.04 * np.linalg.norm(sigma)).sum() for sigma in sigmas])
    assert measured["rank@0.04"] == pytest.approx(above, abs=1e-3)


@pytest.mark.slow
def test_decay_lowers_the_rank_beyond_what_noise_does(sweep):
    settings = sweep.with_controls(sweep.QUICK)
    runs = sweep.train_all(settings, num_seeds=1)
    weak, strong = sweep.QUICK
    off = sweep.mean_of(runs, weak.without_decay())
    assert off > sweep.mean_of(runs, weak) > sweep.mean_of(runs, strong)
    assert sweep.differences(runs, strong)[0] < -5


def test_the_trends_of_the_documented_run(sweep, saved):
    runs = [
        sweep.Run(sweep.Setting(**run["setting"]), run["seed"], run["accuracy"], run["measures"])
        for run in saved["runs"]
    ]

    def ranks(settings):
        return [sweep.mean_of(runs, setting) for setting in settings]

    def effects(settings):
        return [np.mean(sweep.differences(runs, setting)) for setting in settings]

    assert ranks(sweep.SAME_EPOCHS) == sorted(ranks(sweep.SAME_EPOCHS))
    for settings in (sweep.BY_STEP_SIZE, sweep.BY_DECAY, sweep.STRONG):
        assert ranks(settings) == sorted(ranks(settings), reverse=True)
        assert effects(settings) == sorted(effects(settings), reverse=True)
    # The control at equal numbers of steps: no trend with the batch size is left.
    assert max(ranks(sweep.SAME_STEPS)) - min(ranks(sweep.SAME_STEPS)) < 3


def test_the_card_shows_the_table_of_the_run(root):
    table = (root / "docs/results/rank_collapse_sweep.md").read_text()
    assert table.strip() in (root / "docs/methods/rank_collapse.md").read_text()
    peers = (root / "docs/results/rank_cpu.md").read_text()
    card = (root / "docs/methods/rank_collapse.md").read_text()
    rows = [line for line in card.splitlines() if line.startswith(("| ResNet", "| GPT"))]
    assert len(rows) == 6
    assert all(row in peers for row in rows)
