"""The reproduction trains what it says, shows what the card says of it, and the documentation shows the run."""

from __future__ import annotations

import json
import math

import pytest
import torch
from support.least_squares import diagonal_risks
from support.reproductions import load


@pytest.fixture(scope="module")
def script(root):
    """The script as a module."""
    return load("critical_batch_size_digits")


@pytest.fixture(scope="module")
def numbers(root):
    return json.loads((root / "docs/results/critical_batch_size_digits.json").read_text())


def test_networks_side_by_side_are_networks(script):
    x, y = script.load_digits()
    layers = script.weights(num_lrs=2, num_seeds=3)
    draw = torch.arange(60).view(6, 10)
    found = script.losses(layers, x[draw], y[draw])
    for run in range(6):
        hidden = x[draw[run]]
        for layer in layers[:-1]:
            hidden = (hidden @ layer[run]).relu()
        expected = torch.nn.functional.cross_entropy(hidden @ layers[-1][run], y[draw[run]])
        torch.testing.assert_close(found[run], expected)
    assert torch.equal(layers[0][0], layers[0][3])  # the same seed at another step size
    assert not torch.equal(layers[0][0], layers[0][1])


def test_steps_are_counted_until_the_target(script, monkeypatch):
    x, y = script.load_digits()
    monkeypatch.setattr(script, "TARGET", 1.5)
    found = script.steps_to_target(x, y, 64, (1e-6, 0.1), num_seeds=2, max_steps=60)
    assert found[0].isinf().all()
    layers = script.weights(1, 2)
    generator, steps = torch.Generator().manual_seed(64), 0
    while script.losses([w[:1] for w in layers], x[None], y[None]) >= 1.5:
        draw = torch.randint(len(x), (2, 64), generator=generator)
        gradients = torch.autograd.grad(script.losses(layers, x[draw], y[draw]).sum(), layers)
        layers = [
            (w - 0.1 * g).detach().requires_grad_() for w, g in zip(layers, gradients, strict=True)
        ]
        steps += 1
    assert found[1, 0] == steps


def test_the_fit_finds_the_scale_of_exact_steps(script):
    rows = [script.Row(b, 0.1, 50 * (1 + 30 / b), 0, 0, 0) for b in (4, 16, 64, 256)]
    assert script.fitted_scale(rows) == pytest.approx(30, rel=0.01)


@pytest.mark.slow
def test_the_recursion_is_the_oracle(script):
    rows, threshold = script.run_recursion()
    h = 1 / torch.arange(1.0, 51.0, dtype=torch.float64).numpy()
    assert threshold == pytest.approx(7.4992, abs=5e-5)
    for row in rows:
        gamma = 2 * row.batch_size / (h.sum() + 2 + (row.batch_size - 1)) / 2
        tail, last, _ = diagonal_risks(
            h, 0.01 * h, 0 * h + 1, gamma, row.batch_size, row.steps, row.steps // 2
        )
        assert (row.tail, row.last) == pytest.approx((tail, last), rel=1e-9)


def test_what_the_card_says_of_the_documented_run(numbers):
    scale, fitted = numbers["noise_scale"]["value"], numbers["fitted_scale"]
    assert 1 / 2.2 < scale / fitted < 2.2
    rows = {row["batch_size"]: row for row in numbers["digits"]}
    ours = max(abs(math.log(row["steps"] / row["predicted"])) for row in rows.values())
    control = max(abs(math.log(row["steps"] / row["linear"])) for row in rows.values())
    assert ours < math.log(1.5)
    assert control > math.log(15)
    assert rows[1024]["steps"] > rows[32]["steps"] / 2
    risks = {row["batch_size"]: row for row in numbers["recursion"]}
    assert risks[8]["tail"] < risks[1]["tail"]
    assert risks[50]["tail"] > 9 * risks[8]["tail"]
    assert all(row["tail"] < row["last"] for b, row in risks.items() if b < 50)
    assert risks[50]["tail"] > risks[50]["last"]


def test_the_card_shows_the_tables_of_the_runs(root, numbers):
    card = (root / "docs/methods/critical_batch_size.md").read_text()
    for name in (
        "critical_batch_size_digits",
        "critical_batch_size_recursion",
        "gradient_sources_cpu",
    ):
        assert (root / f"docs/results/{name}.md").read_text().strip() in card
    scale = numbers["noise_scale"]
    assert f"{scale['value']:.1f} samples ({scale['low']:.1f} to {scale['high']:.1f})" in card
