"""Whether the ranks return what they should, found out by a second rank that computes one part again."""

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
    """Whose part is looked at, and by whom; in n(n − 1) audits every rank looks at every other once.

    Args:
        number: Of the audit.
        num_ranks: Number of ranks [n].

    Example:
        >>> [pair(number, 3) for number in range(6)]
        [(0, 1), (1, 2), (2, 0), (0, 2), (1, 0), (2, 1)]
    """
    owner = number % num_ranks
    return owner, (owner + 1 + number // num_ranks % (num_ranks - 1)) % num_ranks


Recompute: TypeAlias = Callable[[int, Tensor], Tensor]
"""Combines all rows in the columns of a part: from its number and the rows, of shape (N, s)."""


class ShardAudit:
    """Lets a second rank combine one part of the gradients again, and all ranks where the two differ.

    Args:
        exchange: Between the ranks.

    Attributes:
        num_wrong: For each rank, how often it returned something else than the majority.
    """

    def __init__(self, exchange: AllToAll) -> None:
        self.exchange = exchange
        self.num_wrong = [0] * exchange.num_ranks

    def __call__(
        self, number: int, rows: Tensor, result: Tensor, recompute: Recompute, step: int
    ) -> Tensor:
        """What the parts should be.

        Args:
            number: Of the audit.
            rows: What this rank sent, of shape (k, ns).
            result: What came back, of shape (ns,); corrected in place.
            recompute: Combines the rows in a part of the columns.
            step: Optimizer steps so far.
        """
        n = self.exchange.num_ranks
        owner, auditor = pair(number, n)
        mine = rows.view(len(rows), n, -1)[:, owner].contiguous()
        part = result.view(n, -1)[owner]
        again = partial(recompute, owner)
        is_right = self._second_opinion(mine, part, auditor, again, step)
        words = self.exchange.trade({}, {}, [is_right], Purpose.AUDIT, step)
        if not words[auditor][0]:
            self._settle(mine, part, (owner, auditor), again, step)
        return result

    def _second_opinion(
        self,
        mine: Tensor,
        part: Tensor,
        auditor: int,
        again: Callable[[Tensor], Tensor],
        step: int,
    ) -> bool:
        is_mine = self.exchange.rank == auditor
        columns = mine.new_empty((self.exchange.num_ranks, *mine.shape)) if is_mine else mine[:0]
        receive = dict(enumerate(columns)) if is_mine else {}
        self.exchange.trade({auditor: mine}, receive, [], Purpose.AUDIT, step)
        return not is_mine or _hash(again(columns.flatten(0, 1))) == _hash(part)

    def _settle(
        self,
        mine: Tensor,
        part: Tensor,
        pair_of_ranks: tuple[int, int],
        again: Callable[[Tensor], Tensor],
        step: int,
    ) -> None:
        owner, auditor = pair_of_ranks
        computed_here = again(self.exchange.gather_alike(mine, Purpose.AUDIT, step).flatten(0, 1))
        ours = [_hash(computed_here), _hash(part)]
        words = self.exchange.trade({}, {}, ours, Purpose.AUDIT, step)
        truth = majority([computed for computed, _ in words])
        if truth is None:
            rank_zero_warn(
                f"Ranks {owner} and {auditor} computed different parts of the gradient after step {step}, and so did "
                "the others: their hardware or libraries compute different bits. Set audit_every=0."
            )
            return
        wrong = auditor if majority([came for _, came in words]) == truth else owner
        self.num_wrong[wrong] += 1
        did = "returned a wrong part of the gradient" if wrong == owner else "audited wrongly"
        rank_zero_warn(
            f"Rank {wrong} {did} after step {step}, found out by rank {owner + auditor - wrong}; it was put right."
        )
        if ours[0] == truth:
            part.copy_(computed_here)


def _hash(tensor: Tensor) -> int:
    return fingerprint([tensor])
