"""Real processes that the Trainer takes for those of ``torchrun``: each handles its own failure, as on a cluster."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import time
import traceback
from dataclasses import dataclass

import torch


@dataclass
class Outcome:
    """How the process of one rank ended.

    Attributes:
        error: Type and message of the exception that it ended with; empty if none.
        seconds: Time until then.
        result: What the function returned.
        exit_code: Of the process; negative for a signal.
    """

    error: str
    seconds: float
    result: object
    exit_code: int


def run_as_torchrun(function, num_ranks, folder, *, seconds=45.0, meanwhile=None):
    """Call ``function(rank)`` in forked processes with the environment of ``torchrun``; the outcome of every rank.

    Args:
        function: Trains.
        num_ranks: Number of processes.
        folder: For what they return.
        seconds: Processes that take longer are killed, and the test sees it in the exit code.
        meanwhile: Called with the processes, to disturb them.
    """
    port, context = free_port(), multiprocessing.get_context("fork")
    processes = [
        context.Process(target=_work, args=(function, rank, num_ranks, port, folder), daemon=True)
        for rank in range(num_ranks)
    ]
    begin = time.monotonic()
    for process in processes:
        process.start()
    if meanwhile is not None:
        meanwhile(processes)
    for process in processes:
        process.join(max(0.0, begin + seconds - time.monotonic()))
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            process.join()
    return [_outcome(folder, rank, process) for rank, process in enumerate(processes)]


def _outcome(folder, rank, process):
    file = folder / f"outcome.{rank}"
    saved = torch.load(file, weights_only=False) if file.exists() else ("", float("nan"), None)
    return Outcome(*saved, process.exitcode)


def _work(function, rank, num_ranks, port, folder):
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "test",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_MAX_RESTARTS": "0",
    }
    begin, error, result = time.monotonic(), "", None
    try:
        result = function(rank)
    except BaseException as failure:
        traceback.print_exc()
        error = f"{type(failure).__name__}: {failure}"
    torch.save((error, time.monotonic() - begin, result), folder / f"outcome.{rank}")
    os._exit(1 if error else 0)  # without waiting for the threads of gloo, as a crash does


def free_port():
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
