"""A function in several processes that can talk to each other, with a deadline instead of a hang."""

from __future__ import annotations

import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_ranks(function, num_ranks, folder, seconds=30.0):
    """Call ``function(rank)`` in forked processes that form a gloo group; what it returns, by rank."""
    context = mp.start_processes(
        _work,
        args=(function, num_ranks, folder),
        nprocs=num_ranks,
        join=False,
        daemon=True,
        start_method="fork",
    )
    end = time.monotonic() + seconds
    while not context.join(timeout=0.1):
        if time.monotonic() > end:
            for process in context.processes:
                process.kill()
            pytest.fail(f"{num_ranks} processes were not done after {seconds} s")
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(num_ranks)]


def _work(rank, function, num_ranks, folder):
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=num_ranks,
        timeout=timedelta(seconds=20),
    )
    torch.save(function(rank), folder / f"{rank}.pt")
    dist.destroy_process_group()
