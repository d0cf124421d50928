"""The card of priority sampling says what the documented runs gave: where the gain is, and where it is not."""

from __future__ import annotations

import json
import math

import pytest
from support.reproductions import load

DEFAULT = "λ 0.3, β 0.5 (default)"


@pytest.fixture(scope="module")
def digits(root):
    """The script as a module."""
    return load("priority_sampling_digits")


@pytest.fixture(scope="module")
def saved(root, digits):
    """The documented runs."""
    runs = json.loads((root / "docs/results/priority_sampling_digits.json").read_text())
    return [digits.Run(**run) for run in runs]


@pytest.mark.parametrize("stem", ["digits", "rates", "noise", "cpu"])
def test_the_card_shows_the_tables_of_the_runs(root, stem):
    card = (root / "docs/methods/priority_sampling.md").read_text()
    assert (root / f"docs/results/priority_sampling_{stem}.md").read_text().strip() in card


def test_the_default_needs_two_thirds_of_the_steps(digits, saved):
    gain = digits.steps_to(saved, "uniform", 0.02) / digits.steps_to(saved, DEFAULT, 0.02)
    assert gain >= 1.5
    assert len(digits.of(saved, DEFAULT)) == 5


def test_unbiased_weights_gain_next_to_nothing(digits, saved):
    uniform = digits.steps_to(saved, "uniform", 0.01)
    for mix in ("0.5", "0.3"):
        assert uniform / digits.steps_to(saved, f"λ {mix}, β 1", 0.01) < 1.25


def test_unbiased_weights_with_few_uniform_draws_diverge(digits, saved):
    for mix in ("0", "0.1"):
        assert math.isinf(digits.steps_to(saved, f"λ {mix}, β 1", 0.1))


def test_with_wrong_labels_draws_without_weights_do_harm(digits, saved):
    def error(method):
        errors = [run.error for run in digits.of(saved, method, digits.NOISE, 0.3)]
        return sum(errors) / len(errors)

    assert error("λ 0.3, β 0") > 1.15 * error("uniform")
    assert error("λ 0.5, β 1") < 1.1 * error("uniform")


def test_the_script_in_small(digits):
    # One seed, a third of the steps: the default is ahead by then.
    reached = {name: digits.train(name, 0, num_steps=320).reached for name in ("uniform", DEFAULT)}
    assert reached[DEFAULT]["0.05"] < reached["uniform"].get("0.05", 400)
