r"""Rounds of gossip: doubly stochastic matrices, and the messages that each rank sends and receives for them.

Rank i continues from :math:`x_i \leftarrow \sum_j w_{ij} x_j`. If rows and columns of W sum to one, the mean of the
models does not change, and the distance from it shrinks at least by the factor

.. math::
    \beta = \lVert W - \tfrac1n \mathbf{1}\mathbf{1}^\top \rVert_2 .
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import reduce

import torch
from torch import Tensor

# Weights such as ⅓ sum to one up to rounding only.
TOLERANCE = 1e-12


class Mixing:
    """Gossip among a known number of ranks: the same matrix in every round, or several in turn.

    Args:
        num_ranks: Number of ranks [n].
        num_rounds: Length of a cycle; round r is the same as round r modulo this number.
        row: ``row(i, r)`` returns the weights of rank i in round r by rank [w_ij]; zeros may be left out.

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
            # A weight of zero needs no message.
            [{j: w for j, w in row(rank, t).items() if w} for rank in range(num_ranks)]
            for t in range(num_rounds)
        ]

    def receive(self, rank: int, round_index: int) -> dict[int, float]:
        """Return the ranks from which a rank receives, with the weights of their models.

        Args:
            rank: The rank [i].
            round_index: Number of the round, from 0.
        """
        # Sorted, so that every run adds up in the same order and rounds alike.
        return {j: w for j, w in sorted(self._row(rank, round_index).items()) if j != rank}

    def send(self, rank: int, round_index: int) -> list[int]:
        """Return the ranks to which a rank sends.

        Args:
            rank: The rank [j].
            round_index: Number of the round, from 0.
        """
        others = (i for i in range(self.num_ranks) if i != rank)
        # From the rows of the receivers, so that a message is never sent to nobody or awaited in vain.
        return [i for i in others if rank in self._row(i, round_index)]

    def matrix(self, round_index: int = 0) -> Tensor:
        """Return the matrix [W] of a round, in float64.

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
        """Factor by which one cycle of rounds shrinks the distance from the mean, in the worst case [β]."""
        return contraction(chain([self.matrix(t) for t in range(self.num_rounds)]))

    @property
    def spectral_gap(self) -> float:
        """One minus :attr:`beta`: 1 for an exact average, 0 if the graph is not connected."""
        return 1.0 - self.beta

    @property
    def is_doubly_stochastic(self) -> bool:
        """Whether in every round no weight is negative and rows and columns sum to one."""
        return all(is_doubly_stochastic(self.matrix(t)) for t in range(self.num_rounds))

    def _row(self, rank: int, round_index: int) -> Mapping[int, float]:
        return self._rows[round_index % self.num_rounds][rank]


def chain(matrices: Sequence[Tensor]) -> Tensor:
    """Multiply the matrices of successive rounds, the last one leftmost."""
    return reduce(lambda product, matrix: matrix @ product, matrices)


def contraction(matrix: Tensor) -> float:
    r"""Return the largest singular value of :math:`W - \frac1n \mathbf{1}\mathbf{1}^\top` [β].

    Args:
        matrix: Doubly stochastic matrix, of shape (n, n).

    Example:
        >>> contraction(torch.eye(3)), round(contraction(torch.full((4, 4), 0.25)), 6)
        (1.0, 0.0)
    """
    centred = matrix.double() - 1 / len(matrix)
    # Not by eigenvalues: matrices of directed graphs are not symmetric.
    return float(torch.linalg.matrix_norm(centred, ord=2))


def is_doubly_stochastic(matrix: Tensor, tolerance: float = TOLERANCE) -> bool:
    """Tell whether no entry is negative, and all rows and columns sum to one up to a tolerance."""
    sums = torch.cat([matrix.sum(dim=0), matrix.sum(dim=1)])
    return bool((matrix >= 0).all() and (sums - 1).abs().max() <= tolerance)
