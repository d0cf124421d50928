"""Find out which rank failed when communication fails."""

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
    """Communication between ranks failed; the message names the rank that caused it, where that is known."""


class FailureReports:
    """Reports of all ranks on what went wrong, in the key-value store of the process group.

    The store takes part in no collective and so still answers after a rank has failed, unless that rank hosts the
    store (rank 0, except with ``torchrun``).

    Args:
        rank: This rank.
        num_ranks: Number of ranks.
        store: Store that all ranks share.
        seconds: How long to wait for the reports of other ranks.
    """

    def __init__(self, rank: int, num_ranks: int, store: Store, seconds: float = 2.0) -> None:
        self.rank, self.num_ranks, self.seconds = rank, num_ranks, seconds
        self.store = PrefixStore("lightning_sgd/failures", store)

    def publish(self, message: str) -> None:
        """Store what happened on this rank, in words that continue "rank 3 …"; the first report counts."""
        with suppress(Exception):  # the rank that hosts the store may be gone
            self.store.compare_set(f"report/{self.rank}", "", message)

    def linger(self, ranks: Iterable[int] | None = None) -> None:
        """Keep rank 0 alive until some ranks (by default all others) have read the reports or have failed too.

        Rank 0 may host the store: if it ended at once, the others could not learn why.
        """
        if self.rank:
            return
        waited_for = list(range(1, self.num_ranks) if ranks is None else ranks)
        deadline = time.monotonic() + self.seconds
        with suppress(Exception):
            while not all(map(self._is_done, waited_for)) and time.monotonic() < deadline:
                time.sleep(POLL_SECONDS)

    def collect(self, place: str) -> str:
        """Report a failed exchange, such as "round after step 12", read the other reports, and return the diagnosis."""
        try:
            # The own report first, because other ranks wait for it. An expected value of "" sets only what is not
            # there.
            self.store.compare_set(f"report/{self.rank}", "", f"{LOST}{place}")
            self._wait_for_reports()
            reports = {rank: self._read(rank) for rank in range(self.num_ranks)}
            self.store.set(f"done/{self.rank}", "")
            self.linger(rank for rank, report in reports.items() if report)
        # Any error: torch has no one type of error for a store that is gone.
        except Exception:
            return "Rank 0 does not answer: it failed, or was stopped, or its host is out of reach."
        return diagnose(reports)

    def _wait_for_reports(self) -> None:
        keys = [f"report/{rank}" for rank in range(self.num_ranks)]
        deadline = time.monotonic() + self.seconds
        while not self.store.check(keys) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)

    def _is_done(self, rank: int) -> bool:
        report = self._read(rank)
        return self.store.check([f"done/{rank}"]) or (report is not None and LOST not in report)

    def _read(self, rank: int) -> str | None:
        key = f"report/{rank}"
        return self.store.get(key).decode() if self.store.check([key]) else None


def diagnose(reports: Mapping[int, str | None]) -> str:
    """Say which ranks failed; else which do not answer (``None``); else which are in another exchange.

    Example:
        >>> diagnose({0: LOST + "round after step 3", 1: "raised ValueError: no such file"})
        'Rank 1 raised ValueError: no such file.'
        >>> diagnose({0: LOST + "round after step 3", 1: None, 2: None})
        'Ranks 1, 2 do not answer: killed, stopped, or out of reach.'
    """
    failed = [
        f"Rank {r} {report}." for r, report in reports.items() if report and LOST not in report
    ]
    silent = [str(rank) for rank, report in reports.items() if report is None]
    # An error on one rank is the cause; that the others could not finish only follows from it.
    if failed:
        return " ".join(failed)
    if silent:
        ranks = f"Rank {silent[0]} does" if len(silent) == 1 else f"Ranks {', '.join(silent)} do"
        return f"{ranks} not answer: killed, stopped, or out of reach."
    places = {rank: report.removeprefix(LOST) for rank, report in reports.items() if report}
    if len(set(places.values())) > 1:
        return describe_mismatch(places)
    return "Every rank still answers: the network between them failed, or was too slow."


def describe_mismatch(places: Mapping[int, str]) -> str:
    """Say in which exchange each rank is, and what usually causes that."""
    ranks = "; ".join(f"rank {rank}: {place}" for rank, place in places.items())
    return f"The ranks are not at the same place: {ranks}. {EQUALLY_LONG}"


def is_failed_exchange(error: BaseException) -> bool:
    """Tell errors of communication from all others."""
    if isinstance(error, (dist.DistBackendError, dist.DistNetworkError)):
        return True
    # gloo raises plain RuntimeErrors, which only their texts tell apart.
    signs = ("gloo", "Connection closed by peer", "Connection reset", "Timed out waiting")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)
