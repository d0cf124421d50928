"""The published tables of trainings on real ranks: the orders that matter, and that the code still makes a number."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support.reproductions import load

ROOT = Path(__file__).parents[2]
RUNS = {
    (run["dealt"], run["attack"], run["rule"], run["num_ranks"]): run["accuracy"]
    for run in json.loads((ROOT / "docs/results/byzantine_ranks.json").read_text())
}
BREAKING = ("sign flip × 100", "NaN", "infinity", "IPM, ε = 5", "Gaussian, σ = 10", "bit flip")


@pytest.fixture(scope="module")
def ranks():
    return load("byzantine_ranks")


def accuracy(dealt, attack, *rules, num_ranks=None):
    """Of the first of these rules that the table has; 0 where training diverged."""
    found = [
        value
        for (d, a, rule, n), value in RUNS.items()
        if (d, a) == (dealt, attack) and rule in rules and num_ranks in (None, n)
    ]
    assert found, (dealt, attack, rules)
    return found[0] or 0.0


def test_with_data_alike_the_filter_trains_as_if_there_were_no_attack():
    plain = accuracy("iid", "none", "DDP", num_ranks=4)
    for dealt, attack, rule, num_ranks in RUNS:
        if (dealt, rule, num_ranks) == ("iid", "filter", 4):
            assert accuracy(dealt, attack, rule, num_ranks=4) > plain - 0.02, attack


@pytest.mark.parametrize("attack", BREAKING)
def test_beside_it_ddp_fails(attack):
    assert accuracy("iid", attack, "DDP", "mean") < 0.5


def test_mixing_repairs_the_median_where_data_differ():
    for attack in ("none", "mimic", "label flip"):
        mixed, plain = (accuracy("dirichlet", attack, rule) for rule in ("nnm+median", "median"))
        assert mixed > plain + 0.01, attack


def test_robustness_ends_where_every_rank_has_classes_of_its_own():
    assert accuracy("sorted", "none", "DDP") > 0.9
    assert accuracy("sorted", "none", "median") < 0.7
    for rule in ("cclip", "geomed", "nnm+trmean", "filter", "median"):
        assert accuracy("sorted", "sign flip × 100", rule) < 0.9, rule


@pytest.mark.slow
@pytest.mark.timeout(90)
def test_the_code_still_makes_a_number_of_the_table(ranks):
    setting = ranks.Setting("iid", "NaN", "filter", 4, 1)
    with torch.random.fork_rng():
        assert ranks.run(setting, 150) == pytest.approx(accuracy("iid", "NaN", "filter"), abs=0.02)
