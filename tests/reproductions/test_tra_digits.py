"""The card of TRA says what the documented runs gave: the controls explain the gain."""

from __future__ import annotations

import json
import re

import pytest
from support.reproductions import load


@pytest.fixture(scope="module")
def digits(root):
    return load("tra_digits")


@pytest.fixture(scope="module")
def saved(root, digits):
    """The documented runs."""
    runs = json.loads((root / "docs/results/tra_digits.json").read_text())
    return [digits.Run(**run) for run in runs]


def test_the_card_shows_the_tables_of_the_runs(root):
    card = (root / "docs/methods/tra.md").read_text()
    assert (root / "docs/results/tra_digits.md").read_text().strip() in card
    timings = (root / "docs/results/tra_cpu.md").read_text()
    rows = re.findall(r"^\|.* M in .*$", card, flags=re.MULTILINE)
    assert len(rows) == 20
    assert all(row in timings for row in rows)


@pytest.mark.slow
def test_sgd_fails_where_trsgd_and_its_controls_train(digits):
    # The reproduction in small: three epochs of the twelve, one seed.
    losses = {
        method: digits.train(method, 0, num_epochs=3).losses[-1]
        for method in ("SGD, lr 0.1", "TRSGD, lr 0.1", "falling steps only", "SGD, lr 0.0293")
    }
    assert losses["SGD, lr 0.1"] > 5 * losses["TRSGD, lr 0.1"]
    for control in ("falling steps only", "SGD, lr 0.0293"):
        assert losses[control] < 1.5 * losses["TRSGD, lr 0.1"]


def test_the_control_at_the_average_step_explains_the_gain(digits, saved):
    accuracy = {method: digits.summary(saved, method)[2] for method in digits.METHODS}
    assert accuracy["SGD, lr 0.1"] < 30
    assert accuracy["TRSGD, lr 0.1"] > 97.5
    for control in ("falling steps only", "SGD, lr 0.0293"):
        assert accuracy[control] == pytest.approx(accuracy["TRSGD, lr 0.1"], abs=0.5)
    assert accuracy["pull only"] < accuracy["SGD, lr 0.0293"] - 2


def test_plain_adam_wins_where_the_card_says_so(digits, saved):
    accuracy = {method: digits.summary(saved, method)[2] for method in digits.METHODS}
    assert accuracy["Adam, lr 0.001"] > accuracy["TRAdam, lr 0.001"] + 5
    small, staged = accuracy["Adam, lr 0.000293"], accuracy["TRAdam, lr 0.001"]
    assert staged == pytest.approx(small, abs=0.5)
    trio = [accuracy[name] for name in ("Adam, lr 0.01", "TRAdam, lr 0.01", "Adam, lr 0.00293")]
    assert max(trio) - min(trio) < 0.2


def test_the_average_step_of_a_stage(digits):
    # H₁₀ = 7381/2520
    assert pytest.approx(7381 / 25200) == digits.SHARE
