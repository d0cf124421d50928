"""Workers that attack on purpose, to test a rule before anybody else does."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_sgd._validation import expect
from lightning_sgd.aggregation import Attack
from lightning_sgd.strategies._comm.fingerprints import short_hash


class SimulatedAttack:
    """Replaces the rows of some workers.

    An attack that depends on the attacker's own gradient only replaces it on the sender. One that knows the gradients
    of honest workers is simulated by the ranks that combine: each replaces the rows in its columns, so that nothing
    more is sent.

    Args:
        attack: Makes the rows of faulty workers from those of the honest ones.
        ranks: Ranks that attack, with all their micro-batches; on one device, the micro-batches that attack.
        num_ranks: Number of ranks.
    """

    def __init__(self, attack: Attack, ranks: Sequence[int], num_ranks: int) -> None:
        remedy = "Try it with micro-batches as workers on one device."
        fits = num_ranks == 1 or attack.scope != "rows"
        expect(fits, "attack", "one that needs no whole rows of others", attack, remedy)
        self.attack, self.ranks, self.num_ranks = attack, sorted(set(ranks)), num_ranks

    def on_sender(self, rows: Tensor, rank: int, step: int) -> Tensor:
        """Return what a rank sends instead of its rows, of shape (k, d)."""
        if self.attack.scope != "own" or self.num_ranks == 1 or rank not in self.ranks:
            return rows
        # Attacks of this scope know of no honest rows.
        return self.attack(rows[:0], rows, _generator(rows, step, rank))

    def on_columns(self, columns: Tensor, shard: int, step: int) -> Tensor:
        """Return what is combined instead of one shard of all rows, of shape (N, s), rank by rank."""
        if self.attack.scope == "own" and self.num_ranks > 1:
            return columns
        attackers = self._rows(len(columns))
        honest = [index for index in range(len(columns)) if index not in set(attackers)]
        attacked = columns.clone()
        generator = _generator(columns, step, shard)
        attacked[attackers] = self.attack(columns[honest], columns[attackers], generator)
        return attacked

    def _rows(self, num_rows: int) -> list[int]:
        if self.num_ranks == 1:
            return [row for row in self.ranks if row < num_rows]
        per_rank = num_rows // self.num_ranks
        return [rank * per_rank + index for rank in self.ranks for index in range(per_rank)]


def _generator(like: Tensor, step: int, number: int) -> torch.Generator:
    # Seeded, so that an audit draws the same numbers. The text is part of the seed and must not change.
    seed = short_hash(f"drill {step} {number}".encode())
    return torch.Generator(like.device).manual_seed(seed)
