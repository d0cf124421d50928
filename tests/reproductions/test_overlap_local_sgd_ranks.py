"""The published table of Overlap-Local-SGD on real ranks: what it must show, and that the code still makes it."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean

import pytest
import torch
from support.reproductions import load

ROOT = Path(__file__).parents[2]


digits = load("overlap_local_sgd_digits")
ranks = load("overlap_local_sgd_ranks")
PUBLISHED = json.loads((ROOT / "docs/results/overlap_local_sgd_ranks.json").read_text())
COMPENSATED = "Overlap, γ × 1.45"


def mean_of(what, method, shards, period):
    keys = {"method": method, "shards": shards, "period": period}
    return fmean(run[what] for run in PUBLISHED if keys.items() <= run.items())


# --- what was published


def test_real_ranks_lead_to_the_models_of_one_process():
    for run in PUBLISHED:
        assert run["loss"] == pytest.approx(run["simulated_loss"], abs=1.1e-5)


def test_compensated_overlap_matches_parallel_sgd_on_shards_alike():
    parallel = mean_of("loss", "Local SGD", "alike", 1)
    assert mean_of("loss", COMPENSATED, "alike", 2) == pytest.approx(parallel, rel=0.05)
    assert mean_of("loss", "Overlap", "alike", 2) > 1.2 * parallel


@pytest.mark.parametrize("shards", digits.SKEWS)
@pytest.mark.parametrize("period", digits.PERIODS)
def test_compensated_overlap_is_ahead_of_easgd(shards, period):
    overlap, easgd = (mean_of("loss", m, shards, period) for m in (COMPENSATED, "EASGD"))
    assert overlap < easgd


@pytest.mark.parametrize("period", digits.PERIODS)
def test_on_sorted_shards_local_sgd_learns_more(period):
    local, overlap = (mean_of("loss", m, "sorted", period) for m in ("Local SGD", COMPENSATED))
    assert local < overlap < mean_of("loss", "Overlap", "sorted", period)


# --- that the code still does what it did


@pytest.mark.timeout(60)
@pytest.mark.parametrize("method", [COMPENSATED, "CoCoD-SGD", "EASGD"])
def test_ranks_and_one_process_agree(method):
    strategy = ranks.STRATEGIES[method](8)
    models, _ = ranks.train(strategy, 0.64, seed=1, num_epochs=1)
    make, factor = digits.METHODS[method]
    index = list(digits.batches(0.64, 1, 1, 4))
    first = digits.start(1)
    expected = digits.simulate(make(first), first.repeat(4, 1), index, 8, factor)
    torch.testing.assert_close(models, expected, rtol=1e-4, atol=1e-5)
    assert float((models - first).abs().max()) > 0.1


def rows(path):
    """The rows of the tables of a Markdown file, without spaces."""
    lines = ("".join(line.split()) for line in (ROOT / path).read_text().splitlines())
    return [line for line in lines if line.startswith("|") and not line.startswith("|--")]


def test_the_card_shows_the_numbers_that_the_command_made():
    made = rows("docs/results/overlap_local_sgd_ranks.md")
    assert set(made) <= set(rows("docs/methods/overlap_local_sgd.md"))
