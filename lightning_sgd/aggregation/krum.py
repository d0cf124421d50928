"""Krum and the rules built on its scores."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_sgd._validation import expect
from lightning_sgd.aggregation._aggregator import Aggregator, GramRule
from lightning_sgd.functional.robust.order_statistics import mean_near_median
from lightning_sgd.functional.robust.stacked_rows import squared_distances


def krum_scores(distances: Tensor, num_neighbours: int) -> Tensor:
    """Sum the squared distances of each row to its nearest other rows, of shape (n,).

    Args:
        distances: Squared distances of shape (n, n), zero on the diagonal.
        num_neighbours: How many of the nearest others to sum over.

    Example:
        >>> krum_scores(torch.tensor([[0.0, 1.0, 4.0], [1.0, 0.0, 9.0], [4.0, 9.0, 0.0]]), 1)
        tensor([1., 1., 4.])
    """
    # The first is the distance of a row from itself.
    return distances.sort(dim=1).values[:, 1 : num_neighbours + 1].sum(dim=1)


class MultiKrum(GramRule):
    """The mean of the ``num_selected`` rows of smallest Krum score.

    The score of a row is the sum of its squared distances to the n − f − 2 rows nearest to it; of equal scores the
    lower row number wins. It needs n ≥ 2f + 3.

    Cost: one Gram matrix.

    Args:
        num_byzantine: How many of the workers may be faulty [f].
        num_selected: How many rows to average [m], by default n − f; the paper asks for at most n − f − 2.
        num_neighbours: How many nearest rows to sum over, by default n − f − 2 as in the paper.

    Example:
        >>> rows = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0], [1.0, 1.0], [10.0, 10.0]])
        >>> MultiKrum(1)(rows)
        tensor([0.5000, 0.7500])

    Reference:
        Peva Blanchard, El Mahdi El Mhamdi, Rachid Guerraoui, Julien Stainer. Machine Learning with Adversaries:
        Byzantine Tolerant Gradient Descent. NeurIPS 2017.
    """

    def __init__(
        self,
        num_byzantine: int,
        num_selected: int | None = None,
        num_neighbours: int | None = None,
    ) -> None:
        super().__init__(num_byzantine)
        for name, count in (("num_selected", num_selected), ("num_neighbours", num_neighbours)):
            expect(
                count is None or count >= 1, name, "at least 1", count, "The default suits most."
            )
        self.num_selected, self.num_neighbours = num_selected, num_neighbours

    def check(self, num_rows: int) -> None:
        """Refuse fewer than 2f + 3 rows, and more rows to select than are not faulty."""
        super().check(num_rows)
        f = self.num_byzantine
        remedy = (
            f"Of {num_rows} workers at most {max(0, (num_rows - 3) // 2)} may be faulty for Krum."
        )
        expect(
            num_rows >= 2 * f + 3 or f == 0,
            "num_byzantine",
            f"at most ({num_rows} − 3)/2",
            f,
            remedy,
        )
        for name in ("num_selected", "num_neighbours"):
            count = getattr(self, name)
            fits = count is None or count <= num_rows - f
            expect(fits, name, f"at most {num_rows} − {f}", count, "Leave it out.")

    def weights(self, gram: Tensor, num_byzantine: int) -> Tensor:
        """Return uniform weights on the selected rows."""
        n = len(gram)
        # The paper sums squared distances to n − f − 2 others. Other libraries take n − f − 1, or do not square.
        num_neighbours = self.num_neighbours or max(1, n - num_byzantine - 2)
        scores = krum_scores(squared_distances(gram), num_neighbours)
        num_selected = min(self.num_selected or n, n - num_byzantine)
        weights = torch.zeros(n, dtype=gram.dtype)
        weights[scores.argsort(stable=True)[:num_selected]] = 1 / num_selected
        return weights


class Krum(MultiKrum):
    """The row with the smallest sum of squared distances to the n − f − 2 rows nearest to it.

    It needs n ≥ 2f + 3. Being one row, its result is as noisy as one worker's gradient, and where workers' data
    differ it is the gradient of one of them: prefer :class:`MultiKrum`, or put :class:`~lightning_sgd.NNM` before it.

    Cost: one Gram matrix.

    Args:
        num_byzantine: How many of the workers may be faulty [f].
        num_neighbours: How many nearest rows to sum over, by default n − f − 2 as in the paper; some libraries use
            n − f − 1.

    Example:
        >>> rows = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0], [1.0, 1.0], [10.0, 10.0]])
        >>> Krum(1)(rows)
        tensor([1., 0.])

    Reference:
        Peva Blanchard, El Mahdi El Mhamdi, Rachid Guerraoui, Julien Stainer. Machine Learning with Adversaries:
        Byzantine Tolerant Gradient Descent. NeurIPS 2017.
    """

    def __init__(self, num_byzantine: int, num_neighbours: int | None = None) -> None:
        super().__init__(num_byzantine, 1, num_neighbours)


class Bulyan(Aggregator):
    """Krum chooses n − 2f rows, one by one; then the mean, in each coordinate, of the n − 4f nearest to their median.

    After each choice the scores are computed anew on the rows that are left. It needs n ≥ 4f + 3.

    Cost: one Gram matrix, and a sorting network on n − 2f rows.

    Args:
        num_byzantine: How many of the workers may be faulty [f].

    Example:
        >>> Bulyan(1)(torch.tensor([[0.0], [1.0], [2.0], [3.5], [4.0], [6.0], [100.0]]))
        tensor([2.1667])

    Reference:
        El Mahdi El Mhamdi, Rachid Guerraoui, Sébastien Rouault. The Hidden Vulnerability of Distributed Learning in
        Byzantium. ICML 2018.
    """

    def __init__(self, num_byzantine: int) -> None:
        super().__init__(num_byzantine)

    def check(self, num_rows: int) -> None:
        """Refuse fewer than 4f + 3 rows."""
        super().check(num_rows)
        f = self.num_byzantine
        remedy = (
            f"Of {num_rows} workers at most {max(0, (num_rows - 3) // 4)} may be faulty for Bulyan."
        )
        expect(
            num_rows >= 4 * f + 3 or f == 0,
            "num_byzantine",
            f"at most ({num_rows} − 3)/4",
            f,
            remedy,
        )

    def _matrix(self, gram: Tensor, num_byzantine: int) -> Tensor:
        selected = self._selected(squared_distances(gram), num_byzantine)
        return torch.eye(len(gram), dtype=gram.dtype)[selected]

    def _selected(self, distances: Tensor, num_byzantine: int) -> list[int]:
        # Scores are recomputed on the remaining rows, as in the paper; with those of the first round others would win.
        left = list(range(len(distances)))
        selected: list[int] = []
        for _ in range(len(distances) - 2 * num_byzantine):
            num_neighbours = max(1, len(left) - num_byzantine - 2)
            scores = krum_scores(distances[left][:, left], num_neighbours)
            selected.append(left.pop(int(scores.argsort(stable=True)[0])))
        return selected

    def reduce(self, block: Tensor, num_byzantine: int) -> Tensor:
        """Return the mean of the values nearest to the median of each column."""
        # Of the n − 2f chosen rows n − 4f are averaged in each coordinate, so 2f are left out.
        return mean_near_median(block, 2 * num_byzantine)
