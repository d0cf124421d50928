"""Audit shards: a second rank combines one shard again, and all ranks decide if the two differ."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeAlias

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_sgd.functional.robust.robust_statistics import majority
from lightning_sgd.strategies._comm.all_to_all import AllToAll
from lightning_sgd.strategies._comm.collectives import Purpose
from lightning_sgd.strategies._comm.fingerprints import fingerprint


def pair(number: int, num_ranks: int) -> tuple[int, int]:
    """Return the owner of the audited shard, and the auditor; in n(n − 1) audits every rank audits every other once.

    Args:
        number: Number of the audit, from 0.
        num_ranks: Number of ranks [n].

    Example:
        >>> [pair(number, 3) for number in range(6)]
        [(0, 1), (1, 2), (2, 0), (0, 2), (1, 0), (2, 1)]
    """
    owner = number % num_ranks
    return owner, (owner + 1 + number // num_ranks % (num_ranks - 1)) % num_ranks


Recompute: TypeAlias = Callable[[int, Tensor], Tensor]
"""Maps the number of a shard, and that shard of all rows, of shape (N, s), to their combination."""


class ShardAudit:
    """Compares one shard of the result with what a second rank, and if they differ all ranks, compute for it.

    Attributes:
        num_wrong: For each rank, how often it returned something else than the majority.
    """

    def __init__(self, exchange: AllToAll) -> None:
        self.exchange = exchange
        self.num_wrong = [0] * exchange.num_ranks

    def __call__(
        self, number: int, rows: Tensor, result: Tensor, recompute: Recompute, step: int
    ) -> Tensor:
        """Audit a result, correct it in place, and return it; all ranks call this together.

        Args:
            number: Number of the audit, from 0.
            rows: What this rank sent, of shape (k, ns).
            result: Combination of all shards, of shape (ns,).
            recompute: Combines one shard of all rows.
            step: Optimizer steps so far.
        """
        n = self.exchange.num_ranks
        owner, auditor = pair(number, n)
        mine = rows.view(len(rows), n, -1)[:, owner].contiguous()
        shard = result.view(n, -1)[owner]
        again = partial(recompute, owner)
        is_right = self._recompute(mine, shard, auditor, again, step)
        metadata = self.exchange.all_to_all({}, {}, [is_right], Purpose.AUDIT, step)
        # All ranks read the same number, so either all or none come to the exchanges of the decision.
        if not metadata[auditor][0]:
            self._decide(mine, shard, (owner, auditor), again, step)
        return result

    def _recompute(
        self,
        mine: Tensor,
        shard: Tensor,
        auditor: int,
        again: Callable[[Tensor], Tensor],
        step: int,
    ) -> bool:
        is_mine = self.exchange.rank == auditor
        columns = mine.new_empty((self.exchange.num_ranks, *mine.shape)) if is_mine else mine[:0]
        receive = dict(enumerate(columns)) if is_mine else {}
        self.exchange.all_to_all({auditor: mine}, receive, [], Purpose.AUDIT, step)
        # By bits: the same operations on the same rows give the same result, and a tolerance would leave room for a
        # liar.
        return not is_mine or _hash(again(columns.flatten(0, 1))) == _hash(shard)

    def _decide(
        self,
        mine: Tensor,
        shard: Tensor,
        pair_of_ranks: tuple[int, int],
        again: Callable[[Tensor], Tensor],
        step: int,
    ) -> None:
        owner, auditor = pair_of_ranks
        computed_here = again(self.exchange.all_gather(mine, Purpose.AUDIT, step).flatten(0, 1))
        ours = [_hash(computed_here), _hash(shard)]
        metadata = self.exchange.all_to_all({}, {}, ours, Purpose.AUDIT, step)
        truth = majority([computed for computed, _ in metadata])
        if truth is None:
            rank_zero_warn(
                f"Ranks {owner} and {auditor} computed different parts of the gradient after step {step}, and so did "
                "the others: their hardware or libraries compute different bits. Set audit_every=0."
            )
            return
        # The owner is right if what the ranks received from it is what most of them have computed.
        wrong = auditor if majority([received for _, received in metadata]) == truth else owner
        self.num_wrong[wrong] += 1
        did = "returned a wrong part of the gradient" if wrong == owner else "audited wrongly"
        rank_zero_warn(
            f"Rank {wrong} {did} after step {step}, detected by rank {owner + auditor - wrong}; it was corrected."
        )
        # A rank whose own result is not that of the majority keeps what it received.
        if ours[0] == truth:
            shard.copy_(computed_here)


def _hash(tensor: Tensor) -> int:
    return fingerprint([tensor])
