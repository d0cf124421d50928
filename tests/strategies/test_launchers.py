"""The ways in which users start ranks: Lightning's own launcher, ``torchrun`` on one and two nodes, spawning."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.rank_processes import free_port
from support.strategy_training import Run, spread

SCRIPT = Path(__file__).resolve().parent.parent / "support" / "train_script.py"
SECONDS = 200

pytestmark = pytest.mark.timeout(SECONDS + 5)


def start(*arguments, **variables):
    """Start a process as a shell would, in an environment without traces of earlier launches."""
    left = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")
    environment = {key: value for key, value in os.environ.items() if key not in left}
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment | {"OMP_NUM_THREADS": "1", **variables},
    )


def finish(*processes):
    """What they print; they must succeed."""
    outputs = []
    for process in processes:
        output, _ = process.communicate(timeout=SECONDS)
        outputs.append(output)
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output[-4000:]
    return "".join(outputs)


def weights(folder, rank):
    return torch.load(folder / f"weights.{rank}", weights_only=True)


def assert_equal_weights(folder, other, ranks=2):
    for rank in range(ranks):
        ours, expected = weights(folder, rank), weights(other, 0)
        assert all(torch.equal(ours[key], expected[key]) for key in expected)


@pytest.mark.compatible("a script with Lightning's launcher; fit twice, then test")
def test_a_script_that_fits_twice(plugin, tmp_path):
    arguments = (SCRIPT, tmp_path, "--strategy", plugin.name, "--epochs", "1", "2")
    output = finish(start(*arguments))
    accuracies = re.findall(r"rank \d of 2: accuracy (\d\.\d+)", output)
    assert len(accuracies) == 2
    assert len(set(accuracies)) == 1
    assert float(accuracies[0]) > 0.8
    assert_equal_weights(tmp_path, tmp_path)


@pytest.mark.compatible("torchrun on two nodes")
def test_torchrun_on_two_nodes(plugin, tmp_path):
    port = free_port()
    nodes = [
        start(
            "-m",
            "torch.distributed.run",
            "--nnodes=2",
            "--nproc-per-node=1",
            f"--node-rank={node}",
            "--master-addr=127.0.0.1",
            f"--master-port={port}",
            SCRIPT,
            tmp_path,
            f"--strategy={plugin.name}",
            "--devices=1",
            "--nodes=2",
        )
        for node in range(2)
    ]
    output = finish(*nodes)
    accuracies = re.findall(r"rank \d of 2: accuracy (\d\.\d+)", output)
    assert len(accuracies) == 2
    assert len(set(accuracies)) == 1
    assert float(accuracies[0]) > 0.8
    assert_equal_weights(tmp_path, tmp_path)


@pytest.mark.compatible("torchrun --max-restarts")
def test_torchrun_restarts_after_a_rank_was_killed_as_if_nothing_had_happened(plugin, tmp_path):
    def torchrun(name, *options):
        run = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
        folder = tmp_path / name
        script = (SCRIPT, folder, f"--strategy={plugin.name}", *options)
        # torch 2.13 keeps the addresses of the first attempt where all attempts share a store.
        return finish(
            start(*run, "--max-restarts=1", *script, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
        )

    torchrun("undisturbed")
    output = torchrun("disturbed", "--kill-at-step=13")
    assert "Rank 1 does not answer: killed, stopped, or out of reach." in output
    assert "Restoring states from the checkpoint path" in output
    assert_equal_weights(tmp_path / "disturbed", tmp_path / "undisturbed")


@pytest.mark.compatible("spawned processes")
def test_spawned_processes(make, tmp_path):
    run = Run(tmp_path, make(start_method="spawn"))
    assert spread([record["final"] for record in run.ranks]) == 0.0
