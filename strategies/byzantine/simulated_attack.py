"""Workers that attack on purpose, to see what a rule is worth before somebody else does."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_sgd._validation import expect
from lightning_sgd.aggregation import Attack
from lightning_sgd.strategies._comm.fingerprints import short_hash


class Drill:
    """Replaces what some workers send.

    An attack that needs no more than what a worker would have sent replaces it there. One that knows what the honest
    workers send is carried out by the ranks that combine: each replaces its columns, so that nothing more is sent.

    Args:
        attack: Makes the rows of faulty workers from those of the honest.
        ranks: Which ranks attack, all their micro-batches included; on one device, which micro-batches.
        num_ranks: Number of ranks.
    """

    def __init__(self, attack: Attack, ranks: Sequence[int], num_ranks: int) -> None:
        remedy = "Try it with micro-batches as workers on one device."
        fits = num_ranks == 1 or attack.scope != "rows"
        expect(fits, "attack", "one that needs no whole rows of others", attack, remedy)
        self.attack, self.ranks, self.num_ranks = attack, sorted(set(ranks)), num_ranks

    def at_home(self, rows: Tensor, rank: int, step: int) -> Tensor:
        """What a rank sends instead of its rows.

        Args:
            rows: Of shape (k, d), of this rank.
            rank: This rank.
            step: Optimizer steps so far.
        """
        if self.attack.scope != "own" or self.num_ranks == 1 or rank not in self.ranks:
            return rows
        return self.attack(rows[:0], rows, _generator(rows, step, rank))

    def in_columns(self, columns: Tensor, part: int, step: int) -> Tensor:
        """What is combined instead of some columns of all rows.

        Args:
            columns: Of shape (N, s), rank by rank.
            part: Number of the part of the columns.
            step: Optimizer steps so far.
        """
        if self.attack.scope == "own" and self.num_ranks > 1:
            return columns
        attackers = self._rows(len(columns))
        honest = [index for index in range(len(columns)) if index not in set(attackers)]
        attacked = columns.clone()
        generator = _generator(columns, step, part)
        attacked[attackers] = self.attack(columns[honest], columns[attackers], generator)
        return attacked

    def _rows(self, num_rows: int) -> list[int]:
        if self.num_ranks == 1:
            return [row for row in self.ranks if row < num_rows]
        per_rank = num_rows // self.num_ranks
        return [rank * per_rank + index for rank in self.ranks for index in range(per_rank)]


def _generator(like: Tensor, step: int, number: int) -> torch.Generator:
    """The same wherever this is computed again."""
    seed = short_hash(f"drill {step} {number}".encode())
    return torch.Generator(like.device).manual_seed(seed)
