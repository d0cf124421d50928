"""What the reproductions share: tables that the documentation can include, and a problem with a known solution."""

from __future__ import annotations

import pytest
import torch
from rich.table import Table
from support.reproductions import load

shared = load("_shared")


def test_tables_have_no_colour_codes_on_a_terminal_either(monkeypatch, tmp_path):
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich then writes as to a terminal
    table = Table("method", "loss")
    table.add_row("MaSS", "0.1")
    shared.save_table(tmp_path / "table.md", table)
    assert (tmp_path / "table.md").read_text() == (
        "| method | loss |\n|--------|------|\n| MaSS   | 0.1  |\n"
    )


def test_steps_are_those_of_gradient_descent_written_out():
    x, y = torch.ones(1, 64), torch.tensor([3])  # one sample: every batch is this one
    torch.manual_seed(0)
    net = torch.nn.Linear(64, 10, bias=False)
    weight = net.weight.detach().clone()
    batches = {"lr": 0.1, "batch_size": 2, "num_steps": 3}
    seen = []
    for step in shared.sgd_steps(net, x, y, **batches):
        seen.append(step)
        torch.testing.assert_close(net.weight.detach(), weight)
        error = (x @ weight.T).softmax(dim=1) - torch.eye(10)[y]
        weight -= 0.1 * error.T @ x
    assert seen == [0, 1, 2]
    torch.testing.assert_close(net.weight.detach(), weight)


@pytest.mark.parametrize("folder", [None, "mass"])
def test_nothing_is_written_without_a_folder(folder):
    options = shared.arguments("", folder, quick="").parse_args([])
    assert (options.output is None) == (folder is None)
