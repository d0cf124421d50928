"""The reproduction on the card of Hogwild!: what it claims, in small, and that the card shows what was made."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from support.reproductions import load

ROOT = Path(__file__).parents[2]


steps = load("hogwild_steps")


@pytest.fixture(scope="module")
def published():
    rows = json.loads((ROOT / "docs/results/hogwild_steps.json").read_text())
    return {(row["schedule"], row["delay"]): row for row in rows}


def test_the_optimum_is_that_of_scikit_learn():
    from sklearn.linear_model import LogisticRegression

    rows, optimum, noise = steps.problem().rows, steps.problem().optimum, steps.noise()
    signed, n = rows.numpy(), len(rows)
    labels = np.arange(n) % 2 * 2 - 1  # any signs: rows are images times labels
    fit = LogisticRegression(C=1 / (n * steps.PENALTY), fit_intercept=False, tol=1e-10)
    fit.fit(signed * labels[:, None], labels)
    np.testing.assert_allclose(optimum, fit.coef_[0], atol=1e-5)
    p = 1 / (1 + np.exp(signed @ optimum.numpy()))
    each = steps.PENALTY * optimum.numpy() - signed * p[:, None]
    assert noise == pytest.approx(2 * (each**2).sum(axis=1).mean(), rel=1e-9)


def test_published_numbers_are_those_of_the_code(published):
    for name, delay in [("theorem 5, smooth", 10), ("constant 0.05/L", 0)]:
        errors = steps.simulate(steps.schedules(delay)[name], delay, (300,))
        assert errors[0] == pytest.approx(published[name, delay]["errors"][0], rel=1e-4)


def test_what_the_card_claims(published):
    serial = published["theorem 2: 2/(μ(t + E))", 0]
    assert all(e < b for e, b in zip(serial["errors"], serial["bounds"], strict=True))
    assert serial["errors"][2] == pytest.approx(serial["errors"][1] / 10, rel=0.1)
    smooth = [published["theorem 5, smooth", delay]["errors"][2] for delay in (0, 10, 100)]
    assert max(smooth) < 1.05 * min(smooth)
    assert published["constant 0.05/L", 0]["errors"][0] < serial["errors"][0]
    assert published["constant 0.5/L", 100]["errors"][1] > 1e10


def test_card_shows_the_table_that_the_command_made():
    made = (ROOT / "docs/results/hogwild_steps.md").read_text().strip()
    assert made in (ROOT / "docs/methods/hogwild.md").read_text()
