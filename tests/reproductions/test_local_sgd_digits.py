"""The reproduction of Local SGD shows what the papers claim, and the numbers that can be known exactly."""

from __future__ import annotations

import pytest
import torch
from support.reproductions import load


@pytest.fixture(scope="module")
def digits(root):
    """The script as a module."""
    return load("local_sgd_digits")


@pytest.mark.parametrize(
    ("num_ranks", "risk"), [(1, 7.717e-6), (2, 7.651e-6), (4, 7.519e-6), (8, 7.255e-6)]
)
def test_one_shot_averaging_loses_nothing_in_least_squares(digits, num_ranks, risk):
    # Numbers of the derivation, computed elsewhere from the same recursion.
    assert digits.one_shot_risk(num_ranks) == pytest.approx(risk, abs=5e-10)


@pytest.mark.slow
def test_the_risk_is_that_of_a_simulation(digits):
    # Drawn: the mean of 4 tail averages of 400 runs each, with its standard error.
    torch.manual_seed(0)
    h, b, num_steps, num_runs = 1 / torch.arange(1, 51, dtype=torch.float64), 8, 200, 400
    gamma = b / (float(h.sum()) + 2 + b - 1)
    tails = torch.zeros(num_runs * 4, 50, dtype=torch.float64)
    w = torch.ones_like(tails)
    for step in range(1, num_steps + 1):
        x = torch.randn(len(w), b, 50, dtype=torch.float64) * h.sqrt()
        residual = torch.einsum("rbd,rd->rb", x, w)
        residual -= 0.1 * torch.randn(len(w), b, dtype=torch.float64)
        w = w - gamma * torch.einsum("rb,rbd->rd", residual, x) / b
        if step > num_steps // 2:
            tails += w / (num_steps - num_steps // 2)
    risks = 0.5 * (tails.view(num_runs, 4, 50).mean(dim=1) ** 2 * h).sum(dim=1)
    exact = digits.one_shot_risk(4, num_samples=num_steps * b * 4)
    error = float(risks.std()) / num_runs**0.5
    assert abs(float(risks.mean()) - exact) < 4 * error


def test_sharing_beats_not_sharing_and_skew_costs_more_the_rarer_it_is(digits):
    results = digits.compare(num_epochs=6, num_seeds=1)
    for dealt in digits.SKEWS:
        alone, _ = results["no exchange", dealt]
        assert all(results[method.name, dealt][0] < alone for method in digits.METHODS[:4])
    sorted_losses = [results[m.name, "sorted by label"][0] for m in digits.METHODS[:4]]
    assert sorted_losses == sorted(sorted_losses)
    parallel, h8 = (
        results[name, "evenly dealt"][0] for name in ("parallel SGD", "Local SGD, H = 8")
    )
    assert h8 == pytest.approx(parallel, rel=0.1)
