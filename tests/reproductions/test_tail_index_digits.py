"""The reproduction shows what the paper claims and what the controls say of it, and the documentation shows the run."""

from __future__ import annotations

import json

import pytest
import torch
from support.reproductions import load


@pytest.fixture(scope="module")
def script(root):
    """The script as a module."""
    return load("tail_index_digits")


@pytest.fixture(scope="module")
def rows(root):
    return json.loads((root / "docs/results/tail_index_digits.json").read_text())


def test_the_control_is_gaussian_with_the_covariance_of_the_rows(script):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2000, 2, generator=generator) @ torch.tensor([[1.0, 0.9], [0.0, 0.4]]) + 7
    control = script.gaussian_like(rows, generator)
    torch.testing.assert_close(control.T.cov(), rows.T.cov(), rtol=0.2, atol=0.05)
    assert control.mean(dim=0).abs().max() < 0.1


def test_gradients_of_whole_batches_are_autograds(script):
    x, y = torch.randn(3, 64), torch.tensor([0, 1, 2])
    net, generator = script.bias_free_mlp(), torch.Generator().manual_seed(0)
    rows = script.batch_gradients(net, x, y, size=1, num=64, generator=generator)
    singles = []
    for index in range(3):
        net.zero_grad()
        torch.nn.functional.cross_entropy(
            net(x[index : index + 1]), y[index : index + 1]
        ).backward()
        singles.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
    nearest = (rows[:, None] - torch.stack(singles)).norm(dim=2).min(dim=1).values
    assert nearest.max() < 1e-5


def test_the_paper_and_the_controls_in_the_documented_run(rows):
    for row in rows:
        # The paper's finding, and Gaussian noise that gives the same.
        assert 0.85 < row["pooled"] < 1.2
        assert abs(row["pooled"] - row["control"]) < 0.12
    early = [row for row in rows if row["step"] < 1000]
    assert all(row["shuffled"] - row["pooled"] > 0.2 for row in early)
    assert all(abs(row["coordinate"] - 2) < 3 * row["error"] for row in early)
    late = [row["coordinate"] for row in rows if row["step"] == 3000]
    assert late == sorted(late)
    assert late[0] < 1 < late[-1] < 2


def test_the_card_shows_the_tables_of_the_runs(root):
    card = (root / "docs/methods/tail_index.md").read_text()
    assert (root / "docs/results/tail_index_digits.md").read_text().strip() in card
    times = (root / "docs/results/tail_index_cpu.md").read_text()
    lines = [line for line in times.splitlines() if line.startswith("| float")]
    assert len(lines) == 4
    assert all(line in card for line in lines)
