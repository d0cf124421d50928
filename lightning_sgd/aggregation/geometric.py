"""The geometric median."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from lightning_sgd._validation import expect, expect_one_of, is_finite_at_least
from lightning_sgd.aggregation._aggregator import GramRule
from lightning_sgd.functional.robust.geometric_median import median_among_rows, weiszfeld
from lightning_sgd.functional.robust.stacked_rows import squared_distances

Start: TypeAlias = Literal["mean", "zero"]


class GeometricMedian(GramRule):
    r"""The point with the smallest sum of distances to the rows, :math:`\arg\min_z \sum_i w_i \lVert x_i - z \rVert`.

    If that point is one of the rows, it is found exactly, otherwise by Weiszfeld's algorithm on the Gram matrix,

    .. math:: z \leftarrow \sum_i \beta_i x_i / \sum_i \beta_i, \qquad \beta_i = w_i / \max(\nu, \lVert x_i - z \rVert).

    Half of the rows may be arbitrary; the error is at most κ = 4(1 + f/(n − 2f))² times the variance of the honest
    rows. With ``smoothing=0.1, num_iterations=3, start="zero"`` it is RFA as other libraries run it.

    Cost: one Gram matrix; a step takes n² multiplications.

    Args:
        num_byzantine: How many of the workers may be faulty [f].
        smoothing: Smaller distances are replaced by this [ν]; by default a millionth of the median distance between
            rows, and the rows themselves are tried first.
        num_iterations: Largest number of steps.
        tolerance: Stop when no weight changes by more than this.
        start: Where to start: at the mean or at zero.
        worker_weights: Weight of each worker's distance [w], such as its batch size; equal by default.

    Example:
        >>> GeometricMedian(1)(torch.tensor([[0.0, 0.0], [1.0, 1.0], [2.0, 2.0], [9.0, 0.0], [1.0, 1.0]]))
        tensor([1., 1.])

    Reference:
        Krishna Pillutla, Sham M. Kakade, Zaid Harchaoui. Robust Aggregation for Federated Learning. IEEE Transactions
        on Signal Processing, 2022.
    """

    def __init__(
        self,
        num_byzantine: int,
        smoothing: float | None = None,
        num_iterations: int = 500,
        tolerance: float = 1e-9,
        start: Start = "mean",
        worker_weights: Sequence[float] | None = None,
    ) -> None:
        fits = smoothing is None or (is_finite_at_least(smoothing, 0.0) and smoothing > 0)
        expect(fits, "smoothing", "a positive number", smoothing, "Leave it out.")
        expect(
            num_iterations >= 1,
            "num_iterations",
            "at least 1",
            num_iterations,
            "The default is 500.",
        )
        fits = is_finite_at_least(tolerance, 0.0)
        expect(
            fits, "tolerance", "a number that is not negative", tolerance, "The default is 1e-9."
        )
        expect_one_of(start, Start, "start", "The mean is nearer.")
        self.smoothing, self.num_iterations = smoothing, num_iterations
        self.tolerance, self.start = tolerance, start
        self.centred = start == "mean"  # a start at zero needs the rows as they are
        super().__init__(num_byzantine)
        self._weigh_workers(worker_weights)

    def weights(self, gram: Tensor, num_byzantine: int) -> Tensor:
        """Return the weights of the last step."""
        masses = self._shares(len(gram))
        smoothing = self.smoothing
        if smoothing is None:
            # Weiszfeld's steps converge slowly, or stop too early, where the median is one of the rows.
            exact = median_among_rows(gram, masses)
            if exact is not None:
                return torch.eye(len(gram), dtype=gram.dtype)[exact]
            # Relative to the rows, so that the result does not depend on the scale of the loss.
            smoothing = 1e-6 * _median_distance(gram)
        start = masses if self.start == "mean" else torch.zeros_like(masses)
        return weiszfeld(gram, masses, start, self.num_iterations, smoothing, self.tolerance)


def _median_distance(gram: Tensor) -> float:
    n = len(gram)
    pairs = torch.triu_indices(n, n, offset=1)
    return float(squared_distances(gram)[pairs[0], pairs[1]].quantile(0.5).sqrt())
