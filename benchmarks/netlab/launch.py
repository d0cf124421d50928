"""Start one `torchrun` node per host, and collect the measurements of their ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import fmean
from typing import Any, TypeAlias

import torch

from .network import INTERFACE, Command, Network, inside
from .training import loss_of

PORT = 29500
Snapshots: TypeAlias = dict[int, tuple[float, torch.Tensor]]
ROOT = Path(__file__).resolve().parents[2]


def node_command(network: Network, index: int, options: Sequence[str]) -> Command:
    """Return the command that starts the rank of a host.

    Args:
        network: Of the hosts.
        index: Number of the host.
        options: For the worker.
    """
    settings = [f"GLOO_SOCKET_IFNAME={INTERFACE}", "OMP_NUM_THREADS=1"]
    launcher = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=1"),
        *(f"--nnodes={network.num_hosts}", f"--node-rank={index}"),
        *(f"--master-addr={network.address(0)}", f"--master-port={PORT}"),
    ]
    worker = ["-m", "benchmarks.netlab.worker", *options]
    return inside(network.hosts[index], ["env", *settings, *launcher, *worker])


def run(
    network: Network, options: Sequence[str], folder: Path, seconds: float
) -> list[dict[str, Any]]:
    """Start all nodes, wait for them, and return the means over the ranks, by training.

    Args:
        network: Built.
        options: For the workers.
        folder: Where they write.
        seconds: How long they may take.

    Raises:
        RuntimeError: If a node fails or takes too long; with the end of what it said.
    """
    with ExitStack() as stack:
        logs = [
            stack.enter_context((folder / f"{i}.log").open("wb")) for i in range(network.num_hosts)
        ]
        nodes = [
            subprocess.Popen(
                node_command(network, index, [*options, "--folder", str(folder)]),
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for the lab, which ends them
            )
            for index, log in enumerate(logs)
        ]
        _wait(nodes, folder, time.monotonic() + seconds)
    ranks = range(network.num_hosts)
    rows = means([json.loads((folder / f"{i}.json").read_text()) for i in ranks])
    for index, row in enumerate(rows):
        row["curve"] = curve([torch.load(folder / f"{i}-{index}.pt") for i in ranks])
    return rows


def curve(ranks: list[Snapshots]) -> list[tuple[int, float, float]]:
    """Return step, seconds since the start (mean over the ranks) and loss of the mean of the models.

    Args:
        ranks: By rank, the weights after some steps and when that was.
    """
    points = []
    for step in ranks[0]:
        times, weights = zip(*(each[step] for each in ranks), strict=True)
        loss = loss_of(torch.stack(weights).mean(0))
        points.append((step, round(fmean(times), 4), round(loss, 6)))
    return points


def _wait(nodes: list[subprocess.Popen[bytes]], folder: Path, end: float) -> None:
    while any(node.poll() is None for node in nodes):
        failed = [i for i, node in enumerate(nodes) if node.poll() not in (None, 0)]
        if failed or time.monotonic() > end:
            break
        time.sleep(0.1)
    bad = [i for i, node in enumerate(nodes) if node.poll() != 0]
    if bad:
        said = (folder / f"{bad[0]}.log").read_text(errors="replace")[-3000:]
        raise RuntimeError(
            f"Host {bad[0]} failed or was too slow. The end of what it said:\n{said}"
        )


def means(ranks: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Average every number over the ranks, by training.

    Args:
        ranks: By rank, what it measured in every training.
    """
    found = []
    for same in zip(*ranks, strict=True):
        names = {"label": same[0]["label"], "straggles": same[0]["straggles"]}
        numbers = {key: fmean(each[key] for each in same) for key in same[0].keys() - names}
        found.append({**names, **dict(sorted(numbers.items()))})
    return found
