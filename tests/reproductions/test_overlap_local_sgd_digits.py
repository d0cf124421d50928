"""The published table of Overlap-Local-SGD and its controls: what it must show, and that the code still makes it."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest
import torch
from support.reproductions import load

ROOT = Path(__file__).parents[2]


digits = load("overlap_local_sgd_digits")
PUBLISHED = json.loads((ROOT / "docs/results/overlap_local_sgd_digits.json").read_text())
COMPENSATED = "Overlap, γ × 1.45"


def mean_of(what, method, shards, period):
    keys = {"method": method, "shards": shards, "period": period}
    return fmean(run[what] for run in PUBLISHED if keys.items() <= run.items())


def test_compensated_overlap_matches_parallel_sgd_on_shards_alike():
    parallel = mean_of("loss", "Local SGD", "alike", 1)
    assert mean_of("loss", COMPENSATED, "alike", 2) == pytest.approx(parallel, rel=0.05)
    assert mean_of("loss", "Overlap", "alike", 2) > 1.2 * parallel


@pytest.mark.parametrize("shards", digits.SKEWS)
@pytest.mark.parametrize("period", digits.PERIODS)
def test_compensated_overlap_is_ahead_of_easgd(shards, period):
    overlap, easgd = (mean_of("loss", m, shards, period) for m in (COMPENSATED, "EASGD"))
    assert overlap < easgd


def test_own_models_are_ahead_of_those_of_cocod_in_long_rounds_on_sorted_shards():
    for method in ("Overlap", COMPENSATED):
        ahead = mean_of("accuracy", method, "sorted", 24) - mean_of(
            "accuracy", "CoCoD-SGD", "sorted", 24
        )
        assert ahead > 0.05


def test_the_published_numbers_are_those_of_the_code():
    for method in digits.METHODS:
        ours = digits.train(method, "sorted", 8, seed=1)
        (theirs,) = [
            run
            for run in PUBLISHED
            if (run["method"], run["shards"], run["period"], run["seed"])
            == (method, "sorted", 8, 1)
        ]
        assert ours.loss == pytest.approx(theirs["loss"], rel=0.02)


def test_models_in_rows_are_those_of_a_module():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10))
    row = torch.nn.utils.parameters_to_vector(net.parameters())
    x = torch.rand(2, 5, 64)
    models = torch.stack([row, 2 * row])
    torch.testing.assert_close(digits.logits(models, x)[0], net(x[0]))


def test_rules_of_the_controls_by_hand():
    # Two boundaries of two workers, written out in NumPy.
    start = torch.zeros(1)
    models = torch.tensor([[1.0], [3.0]])
    cocod = digits.CoCoD(start)
    cocod.cross(models)  # 0 + (1 − 0), 0 + (3 − 0); the mean, 2, travels
    models += torch.tensor([[10.0], [20.0]])
    cocod.cross(models)  # 2 + 10, 2 + 20
    assert models.tolist() == [[12.0], [22.0]]
    models = torch.tensor([[1.0], [3.0]])
    easgd = digits.ElasticAveraging(start)
    easgd.cross(models)
    pull = 0.9 / 2
    np.testing.assert_allclose(models.numpy(), [[1 - pull], [3 - 3 * pull]], rtol=1e-6)
    assert easgd.anchor.item() == pytest.approx(4 * pull)


def rows(path):
    """The rows of the tables of a Markdown file, without spaces."""
    lines = ("".join(line.split()) for line in (ROOT / path).read_text().splitlines())
    return [line for line in lines if line.startswith("|") and not line.startswith("|--")]


def test_the_card_shows_the_numbers_that_the_command_made():
    made = rows("docs/results/overlap_local_sgd_digits.md")
    assert set(made) <= set(rows("docs/methods/overlap_local_sgd.md"))
