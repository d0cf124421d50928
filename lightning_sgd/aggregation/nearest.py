"""Rules that keep the n − f rows nearest to a centre."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_sgd._validation import expect
from lightning_sgd.aggregation._aggregator import GramRule
from lightning_sgd.functional.robust.stacked_rows import squared_distances


class FABA(GramRule):
    """The mean after deleting, ``num_byzantine`` times, the row farthest from the mean of the remaining rows.

    Cost: one Gram matrix.

    Args:
        num_byzantine: How many of the workers may be faulty [f].

    Example:
        >>> FABA(1)(torch.tensor([[1.0], [2.0], [3.0], [90.0]]))
        tensor([2.])

    Reference:
        Qi Xia, Zeyi Tao, Zijiang Hao, Qun Li. FABA: An Algorithm for Fast Aggregation against Byzantine Attacks in
        Distributed Neural Networks. IJCAI 2019.
    """

    def weights(self, gram: Tensor, num_byzantine: int) -> Tensor:
        """Return uniform weights on the remaining rows."""
        weights = torch.ones(len(gram), dtype=gram.dtype)
        for _ in range(num_byzantine):
            inner = gram @ (weights / weights.sum())
            from_mean = (
                gram.diagonal() - 2 * inner
            )  # plus the squared norm of the mean, the same for all
            from_mean = torch.where(weights > 0, from_mean, -torch.inf)
            weights[int(from_mean.argsort(descending=True, stable=True)[0])] = 0.0
        return weights / weights.sum()


class MoNNA(GramRule):
    """The mean of the n − f rows nearest to the row of a worker that is trusted, itself among them.

    Cost: one Gram matrix.

    Args:
        num_byzantine: How many of the workers may be faulty [f].
        trusted: Number of the worker that cannot be faulty.

    Example:
        >>> MoNNA(1, trusted=1)(torch.tensor([[1.0], [2.0], [3.0], [90.0]]))
        tensor([2.])

    Reference:
        Sadegh Farhadkhani, Rachid Guerraoui, Nirupam Gupta, Lê-Nguyên Hoang, Rafael Pinot, John Stephan. Robust
        Collaborative Learning with Linear Gradient Overhead. ICML 2023.
    """

    names_workers = True

    def __init__(self, num_byzantine: int, trusted: int = 0) -> None:
        super().__init__(num_byzantine)
        expect(trusted >= 0, "trusted", "the number of a worker", trusted, "They count from 0.")
        self.trusted = trusted

    def check(self, num_rows: int) -> None:
        """Refuse a trusted worker that does not exist."""
        super().check(num_rows)
        remedy = "Workers count from 0."
        expect(self.trusted < num_rows, "trusted", f"less than {num_rows}", self.trusted, remedy)

    def weights(self, gram: Tensor, num_byzantine: int) -> Tensor:
        """Return uniform weights on the rows nearest to the trusted one."""
        workers = self._workers(len(gram))
        remedy = "Its row is not finite, or far longer than the others; trust another worker."
        expect(self.trusted in workers, "trusted", f"one of {workers}", self.trusted, remedy)
        distances = squared_distances(gram)[workers.index(self.trusted)]
        distances[workers.index(self.trusted)] = -1.0  # first even among rows that are equal to it
        return _on_smallest(distances, len(gram) - num_byzantine)


class CGE(GramRule):
    """Comparative gradient elimination: the mean of the n − f shortest rows.

    Faulty rows that are not longer than the others are never left out.

    Cost: one Gram matrix.

    Args:
        num_byzantine: How many of the workers may be faulty [f].

    Example:
        >>> CGE(1)(torch.tensor([[1.0], [2.0], [3.0], [90.0]]))
        tensor([2.])

    Reference:
        Nirupam Gupta, Shuo Liu, Nitin Vaidya. Byzantine Fault-Tolerant Distributed Machine Learning with Norm-Based
        Comparative Gradient Elimination. DSN-W 2021.
    """

    centred = False

    def weights(self, gram: Tensor, num_byzantine: int) -> Tensor:
        """Return uniform weights on the shortest rows."""
        return _on_smallest(gram.diagonal(), len(gram) - num_byzantine)


def _on_smallest(values: Tensor, count: int) -> Tensor:
    weights = torch.zeros_like(values)
    weights[values.argsort(stable=True)[:count]] = 1 / count
    return weights
