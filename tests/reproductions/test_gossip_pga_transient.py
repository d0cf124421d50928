"""The published table of the transient stage: its order, its problem, and that the code still makes it."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from support.reproductions import load
from torch.nn.functional import softplus

ROOT = Path(__file__).parents[2]


transient = load("gossip_pga_transient")
PUBLISHED = json.loads((ROOT / "docs/results/gossip_pga_transient.json").read_text())


@pytest.mark.parametrize("num_ranks", transient.RANKS)
@pytest.mark.parametrize("errors", ["mean_model", "local_models"])
def test_the_order_of_the_paper_in_steps_500_to_1000(num_ranks, errors):
    found = {
        c["method"]: np.mean(c[errors][5:10]) for c in PUBLISHED if c["num_ranks"] == num_ranks
    }
    for better, worse in pairwise(found[method] for method in transient.METHODS):
        assert better < worse


def test_the_mean_models_agree_after_the_transient():
    for num_ranks in transient.RANKS:
        last = [c["mean_model"][-1] for c in PUBLISHED if c["num_ranks"] == num_ranks]
        assert max(last) / min(last) < 1.15


@pytest.mark.parametrize(
    ("num_ranks", "expected"),
    [
        (20, (0.081, 0.122, 0.153, 0.164, 0.307)),
        (50, (0.029, 0.048, 0.063, 0.072, 0.116)),
        (100, (0.0138, 0.0220, 0.0298, 0.0339, 0.0560)),
    ],
)
def test_an_earlier_independent_run_agrees(num_ranks, expected):
    # Another program with other random numbers, steps 900 to 1000.
    found = [c["mean_model"][9] for c in PUBLISHED if c["num_ranks"] == num_ranks]
    assert found == pytest.approx(expected, rel=0.15)


def test_the_published_numbers_are_those_of_the_code():
    curves = transient.simulate(20, 200, 4)
    published = {c["method"]: c for c in PUBLISHED if c["num_ranks"] == 20}
    for curve in curves:
        for ours, theirs in (
            (curve.mean_model, published[curve.method]["mean_model"]),
            (curve.local_models, published[curve.method]["local_models"]),
        ):
            assert ours == pytest.approx(theirs[:2], rel=2e-3)


@pytest.mark.slow
def test_gradients_and_solution_are_those_of_autograd():
    problem = transient.Problem(num_ranks=3, num_trials=2, seed=1)
    x = problem.solution[0].double().requires_grad_()
    z = (problem.signs[0, ..., None] * problem.features[0]).flatten(0, 1).double()
    (gradient,) = torch.autograd.grad(softplus(-z @ x).mean(), x)
    assert float(gradient.norm()) < 1e-6
    many = torch.zeros(1, 2, 3, transient.NUM_FEATURES)
    mean = torch.stack([problem.gradients(many)[0, 0] for _ in range(20_000)]).mean(dim=0)
    at_zero = -(problem.signs[0, ..., None] * problem.features[0]).mean(dim=1) / 2
    torch.testing.assert_close(mean, at_zero, rtol=0, atol=0.06)


def test_matrices_of_every_method():
    mean, ring = torch.full((5, 5), 0.2), transient.matrices(5, 1)[3]
    kinds = [
        "mean" if torch.equal(m, mean) else "ring" if torch.equal(m, ring) else "none"
        for step in (1, 4, 16)
        for m in transient.matrices(5, step)
    ]
    assert kinds[:5] == ["mean", "ring", "ring", "ring", "none"]
    assert kinds[5:10] == ["mean", "mean", "ring", "ring", "none"]
    assert kinds[10:] == ["mean", "mean", "mean", "ring", "mean"]


def rows(path):
    """The rows of the tables of a Markdown file, without spaces."""
    lines = ("".join(line.split()) for line in (ROOT / path).read_text().splitlines())
    return [line for line in lines if line.startswith("|") and not line.startswith("|--")]


@pytest.mark.parametrize("name", ["gossip_pga_transient", "gossip_pga_transient_end"])
def test_the_card_shows_the_numbers_that_the_command_made(name):
    assert set(rows(f"docs/results/{name}.md")) <= set(rows("docs/methods/gossip_pga.md"))
