"""Which rank is to blame when an exchange fails."""

from __future__ import annotations

import time
from contextlib import suppress

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

POLL_SECONDS = 0.05
LOST = "lost the connection"


class ExchangeError(RuntimeError):
    """An exchange between ranks failed; says which rank is to blame where that can be known."""


class RollCall:
    """A page in the store of the process group where every rank writes what went wrong with it.

    The store is no part of any collective, so that it still answers when a rank has failed; unless the rank that keeps
    it, rank 0 without ``torchrun``, has failed.

    Args:
        rank: This rank.
        num_ranks: Number of ranks.
        store: Shared by all ranks.
        seconds: How long to wait for the others to answer.
    """

    def __init__(self, rank: int, num_ranks: int, store: Store, seconds: float = 2.0) -> None:
        self.rank, self.num_ranks, self.seconds = rank, num_ranks, seconds
        self.store = PrefixStore("lightning_sgd/roll_call", store)

    def report(self, message: str) -> None:
        """Let the others know what happened here; the first report counts.

        Args:
            message: Continues "rank 3 …".
        """
        with suppress(Exception):  # the rank that keeps the store may be gone
            self.store.compare_set(str(self.rank), "", message)

    def take(self) -> str:
        """Report that this rank has lost the connection, hear the others, and name who is to blame."""
        self.report(LOST)
        others = [rank for rank in range(self.num_ranks) if rank != self.rank]
        deadline = time.monotonic() + self.seconds
        try:
            while not self._all_have_reported(others) and time.monotonic() < deadline:
                time.sleep(POLL_SECONDS)
            return self._blame({rank: self._heard(rank) for rank in others})
        except Exception:
            return "Rank 0 does not answer: it failed, or was stopped, or its host is out of reach."

    def _all_have_reported(self, ranks: list[int]) -> bool:
        return bool(self.store.check([str(rank) for rank in ranks]))

    def _heard(self, rank: int) -> str | None:
        key = str(rank)
        return self.store.get(key).decode() if self.store.check([key]) else None

    @staticmethod
    def _blame(reports: dict[int, str | None]) -> str:
        failed = [
            f"Rank {rank} {said}." for rank, said in reports.items() if said not in (None, LOST)
        ]
        silent = [str(rank) for rank, said in reports.items() if said is None]
        if failed:
            return " ".join(failed)
        if silent:
            ranks = (
                f"Rank {silent[0]} does" if len(silent) == 1 else f"Ranks {', '.join(silent)} do"
            )
            return f"{ranks} not answer: killed, stopped, or out of reach."
        return "Every rank still answers: the network between them failed, or was too slow."


def is_failed_exchange(error: BaseException) -> bool:
    """Whether an error says that another rank could not be reached in time.

    Args:
        error: Whatever was raised.
    """
    if isinstance(error, (dist.DistBackendError, dist.DistNetworkError)):
        return True
    signs = ("gloo", "Connection closed by peer", "Connection reset", "Timed out waiting")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)
