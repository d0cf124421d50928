"""The card of NovoGrad says what the documented run gave, also where the controls win."""

from __future__ import annotations

import json
import re

import pytest
from support.reproductions import load


@pytest.fixture(scope="module")
def digits(root):
    """The script as a module."""
    return load("novograd_digits")


@pytest.fixture(scope="module")
def saved(root, digits):
    """The documented runs."""
    runs = json.loads((root / "docs/results/novograd_digits.json").read_text())
    return [
        digits.Run(digits.Setting(**run["setting"]), run["seed"], run["accuracy"]) for run in runs
    ]


def best(digits, runs, method, batch_size):
    settings = [digits.Setting(method, lr, batch_size) for lr in digits.STEP_SIZES]
    return max(digits.accuracy(runs, setting) for setting in settings)


def test_the_card_shows_the_tables_of_the_runs(root):
    card = (root / "docs/methods/novograd.md").read_text()
    assert (root / "docs/results/novograd_digits.md").read_text().strip() in card
    timings = (root / "docs/results/novograd_cpu.md").read_text()
    rows = re.findall(r"^\|.* M in .*$", card, flags=re.MULTILINE)
    assert len(rows) == 20
    assert all(row in timings for row in rows)


def test_the_documented_runs_can_be_repeated(digits, saved):
    # Other processors round differently; within 2 of 500 images.
    for setting in (digits.Setting("NovoGrad", 0.03, 1297), digits.Setting("AdamW", 0.03, 1297)):
        (documented,) = (run for run in saved if (run.setting, run.seed) == (setting, 0))
        assert digits.train(setting, 0).accuracy == pytest.approx(documented.accuracy, abs=0.005)


def test_the_scale_of_the_loss_has_no_influence_on_novograd(digits, saved):
    for lr in (0.001, 0.003, 0.01, 0.03):
        plain, scaled = (
            digits.accuracy(saved, digits.Setting("NovoGrad", lr, loss_scale=scale))
            for scale in (1.0, digits.LOSS_SCALE)
        )
        assert plain == pytest.approx(scaled, abs=0.3)
        sgd = digits.Setting("SGD, momentum 0.9", lr, loss_scale=digits.LOSS_SCALE)
        assert digits.accuracy(saved, sgd) < 12


def test_large_batches_at_carried_over_and_at_tuned_step_sizes(digits, saved):
    fixed = [("NovoGrad", 0.03, 81.1), ("AdamW", 0.003, 66.3), ("SGD, momentum 0.9", 0.1, 33.6)]
    for method, lr, value in fixed:
        setting = digits.Setting(method, lr, 1297)
        assert digits.accuracy(saved, setting) == pytest.approx(value, abs=0.05)
    tuned = [best(digits, saved, method, 1297) for method in digits.METHODS]
    assert tuned == pytest.approx([88.7, 92.9, 68.1], abs=0.05)


def test_the_controls_win_where_the_card_says_so(digits, saved):
    leads = [
        best(digits, saved, "AdamW", size) - best(digits, saved, "NovoGrad", size)
        for size in digits.EPOCHS
    ]
    assert leads == pytest.approx([1.0, 0.7, 4.2], abs=0.1)
    for size in (64, 256):
        assert best(digits, saved, "SGD, momentum 0.9", size) > best(
            digits, saved, "NovoGrad", size
        )
