r"""What one round of gossip does: a doubly stochastic matrix, and what each rank sends and receives for it.

Rank i goes on from :math:`x_i \leftarrow \sum_j w_{ij} x_j`. Where rows and columns of W sum to one the mean of the
models stays where it is, and the distance from it shrinks by at least

.. math::
    \beta = \lVert W - \tfrac1n \mathbf{1}\mathbf{1}^\top \rVert_2 .
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import reduce

import torch
from torch import Tensor

TOLERANCE = 1e-12


class Mixing:
    """Gossip among a known number of ranks: the same matrix in every round, or several in turn.

    Args:
        num_ranks: Number of ranks [n].
        num_rounds: Length of a cycle; round r is as round r modulo this.
        row: What rank i, in round r, gives weight to [w_ij] when ``row(i, r)`` is called; zeros may be left out.

    Example:
        >>> pair = Mixing(2, 1, lambda rank, t: {0: 0.5, 1: 0.5})
        >>> pair.receive(0, 7), pair.send(0, 7)
        ({1: 0.5}, [1])
        >>> pair.matrix()
        tensor([[0.5000, 0.5000],
                [0.5000, 0.5000]], dtype=torch.float64)
    """

    def __init__(
        self, num_ranks: int, num_rounds: int, row: Callable[[int, int], Mapping[int, float]]
    ) -> None:
        self.num_ranks, self.num_rounds = num_ranks, num_rounds
        self._rows = [
            [{j: w for j, w in row(rank, t).items() if w} for rank in range(num_ranks)]
            for t in range(num_rounds)
        ]

    def receive(self, rank: int, round_index: int) -> dict[int, float]:
        """From whom a rank receives, and the weight of what comes.

        Args:
            rank: The rank [i].
            round_index: Number of the round, from 0.
        """
        return {j: w for j, w in sorted(self._row(rank, round_index).items()) if j != rank}

    def send(self, rank: int, round_index: int) -> list[int]:
        """To whom a rank sends.

        Args:
            rank: The rank [j].
            round_index: Number of the round, from 0.
        """
        others = (i for i in range(self.num_ranks) if i != rank)
        return [i for i in others if rank in self._row(i, round_index)]

    def matrix(self, round_index: int = 0) -> Tensor:
        """The matrix [W] of a round, float64.

        Args:
            round_index: Number of the round, from 0.
        """
        matrix = torch.zeros(self.num_ranks, self.num_ranks, dtype=torch.float64)
        for rank in range(self.num_ranks):
            for peer, weight in self._row(rank, round_index).items():
                matrix[rank, peer] = weight
        return matrix

    @property
    def beta(self) -> float:
        """Factor by which one cycle of rounds shrinks the distance from the mean, at worst [β]."""
        return contraction(chain([self.matrix(t) for t in range(self.num_rounds)]))

    @property
    def spectral_gap(self) -> float:
        """One minus :attr:`beta`: 1 for an exact average, 0 if some ranks never hear of each other."""
        return 1.0 - self.beta

    @property
    def is_doubly_stochastic(self) -> bool:
        """Whether no weight is negative, and rows and columns sum to one, in every round."""
        return all(is_doubly_stochastic(self.matrix(t)) for t in range(self.num_rounds))

    def _row(self, rank: int, round_index: int) -> Mapping[int, float]:
        return self._rows[round_index % self.num_rounds][rank]


def chain(matrices: Sequence[Tensor]) -> Tensor:
    """What rounds do one after the other: the product, the last one leftmost.

    Args:
        matrices: In the order of the rounds.
    """
    return reduce(lambda product, matrix: matrix @ product, matrices)


def contraction(matrix: Tensor) -> float:
    r"""Largest singular value of :math:`W - \frac1n \mathbf{1}\mathbf{1}^\top` [β].

    Args:
        matrix: Doubly stochastic, of shape (n, n).

    Example:
        >>> contraction(torch.eye(3)), round(contraction(torch.full((4, 4), 0.25)), 6)
        (1.0, 0.0)
    """
    centred = matrix.double() - 1 / len(matrix)
    return float(torch.linalg.matrix_norm(centred, ord=2))


def is_doubly_stochastic(matrix: Tensor, tolerance: float = TOLERANCE) -> bool:
    """Whether no entry is negative, and rows and columns sum to one.

    Args:
        matrix: Square.
        tolerance: How far sums may be from one.
    """
    sums = torch.cat([matrix.sum(dim=0), matrix.sum(dim=1)])
    return bool((matrix >= 0).all() and (sums - 1).abs().max() <= tolerance)
