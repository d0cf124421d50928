"""Which rank is to blame when an exchange fails."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from contextlib import suppress

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

POLL_SECONDS = 0.05
LOST = "could not finish the exchange of "
EQUALLY_LONG = "Give every rank the same number of batches: a sampler that pads, drop_last, or limit_train_batches."


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
        """Let the others know what happened here, before they notice; the first report counts.

        Args:
            message: Continues "rank 3 …".
        """
        with suppress(Exception):  # the rank that keeps the store may be gone
            self.store.compare_set(f"said/{self.rank}", "", message)

    def stay(self, ranks: Iterable[int] | None = None) -> None:
        """Rank 0 may keep the store: it must not leave before the others have read a report, or have failed too.

        Args:
            ranks: Which others; by default all.
        """
        if self.rank:
            return
        waited_for = list(range(1, self.num_ranks) if ranks is None else ranks)
        deadline = time.monotonic() + self.seconds
        with suppress(Exception):
            while not all(map(self._is_done, waited_for)) and time.monotonic() < deadline:
                time.sleep(POLL_SECONDS)

    def take(self, place: str) -> str:
        """Report that an exchange failed here, hear the others, and name who is to blame.

        Args:
            place: The exchange, such as "round after step 12".
        """
        try:
            self.store.compare_set(f"said/{self.rank}", "", f"{LOST}{place}")
            self._wait_for("said", range(self.num_ranks))
            reports = {rank: self._heard(rank) for rank in range(self.num_ranks)}
            self.store.set(f"heard/{self.rank}", "")
            self.stay(rank for rank, said in reports.items() if said)
        except Exception:
            return "Rank 0 does not answer: it failed, or was stopped, or its host is out of reach."
        return blame(reports)

    def _wait_for(self, page: str, ranks: Iterable[int]) -> None:
        keys = [f"{page}/{rank}" for rank in ranks]
        deadline = time.monotonic() + self.seconds
        while not self.store.check(keys) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)

    def _is_done(self, rank: int) -> bool:
        said = self._heard(rank)
        return self.store.check([f"heard/{rank}"]) or (said is not None and LOST not in said)

    def _heard(self, rank: int) -> str | None:
        key = f"said/{rank}"
        return self.store.get(key).decode() if self.store.check([key]) else None


def blame(reports: Mapping[int, str | None]) -> str:
    """Who is to blame for a failed exchange: who failed, else who is silent, else who is somewhere else.

    Args:
        reports: What each rank said of itself; ``None`` for silence.

    Example:
        >>> blame({0: LOST + "round after step 3", 1: "raised ValueError: no such file"})
        'Rank 1 raised ValueError: no such file.'
        >>> blame({0: LOST + "round after step 3", 1: None, 2: None})
        'Ranks 1, 2 do not answer: killed, stopped, or out of reach.'
    """
    failed = [f"Rank {r} {said}." for r, said in reports.items() if said and LOST not in said]
    silent = [str(rank) for rank, said in reports.items() if said is None]
    if failed:
        return " ".join(failed)
    if silent:
        ranks = f"Rank {silent[0]} does" if len(silent) == 1 else f"Ranks {', '.join(silent)} do"
        return f"{ranks} not answer: killed, stopped, or out of reach."
    places = {rank: said.removeprefix(LOST) for rank, said in reports.items() if said}
    if len(set(places.values())) > 1:
        return different_places(places)
    return "Every rank still answers: the network between them failed, or was too slow."


def different_places(places: Mapping[int, str]) -> str:
    """What is wrong when ranks are not in the same exchange.

    Args:
        places: Where each rank is.
    """
    ranks = "; ".join(f"rank {rank}: {place}" for rank, place in places.items())
    return f"The ranks are not at the same place: {ranks}. {EQUALLY_LONG}"


def is_failed_exchange(error: BaseException) -> bool:
    """Whether an error says that another rank could not be reached in time.

    Args:
        error: Whatever was raised.
    """
    if isinstance(error, (dist.DistBackendError, dist.DistNetworkError)):
        return True
    signs = ("gloo", "Connection closed by peer", "Connection reset", "Timed out waiting")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)
