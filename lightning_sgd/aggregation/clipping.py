"""Centred clipping."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from lightning_sgd._validation import expect, is_finite_at_least, plain_number
from lightning_sgd.aggregation._aggregator import GramRule
from lightning_sgd.functional.robust.geometric_median import distances_from


class CenteredClipping(GramRule):
    r"""The previous result plus the mean of the rows' differences from it, each clipped to the length ``radius``.

    .. math:: v \leftarrow v + \sum_i w_i (x_i - v) \min(1, \tau / \lVert x_i - v \rVert), \qquad \sum_i w_i = 1,

    ``num_iterations`` times, starting at the result of the previous call, at first at zero. That result is its state.

    Cost: one Gram matrix of n + 1 rows.

    Args:
        num_byzantine: How many of the workers may be faulty [f].
        radius: How far one row may move the result [τ], about the distance of honest rows from each other;
            ``"auto"`` takes the median distance of the rows from the current result. Values from papers that use the
            momentum m ← βm + g must be multiplied by 1 − β for the momentum of ``ByzantineStrategy``.
        num_iterations: Steps per call [L].
        worker_weights: Weight of each worker [w], such as its batch size; equal by default.

    Example:
        >>> rows = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0], [1.0, 1.0], [10.0, 10.0]])
        >>> rule = CenteredClipping(1, radius=1.0, num_iterations=1)
        >>> rule(rows)
        tensor([0.4828, 0.4828])

    Reference:
        Sai Praneeth Karimireddy, Lie He, Martin Jaggi. Learning from History for Byzantine Robust Optimization. ICML
        2021.
    """

    uses_previous_output = True

    def __init__(
        self,
        num_byzantine: int,
        radius: float | Literal["auto"] = "auto",
        num_iterations: int = 3,
        worker_weights: Sequence[float] | None = None,
    ) -> None:
        super().__init__(num_byzantine)
        self._weigh_workers(worker_weights)
        radius = plain_number(radius)
        fits = radius == "auto" or (is_finite_at_least(radius, 0.0) and radius > 0)
        expect(fits, "radius", "a positive number or auto", radius, "The default finds one.")
        expect(
            num_iterations >= 1, "num_iterations", "at least 1", num_iterations, "The default is 3."
        )
        self.radius, self.num_iterations = radius, num_iterations

    def weights(self, gram: Tensor, num_byzantine: int) -> Tensor:
        """Return the weights of the rows and, last, that of the previous result."""
        n = len(gram) - 1
        # The current result is a combination a of rows and previous result, so the Gram matrix has all distances.
        a = torch.eye(n + 1, dtype=gram.dtype)[n]
        shares = self._shares(n)
        for _ in range(self.num_iterations):
            distances = distances_from(gram, a)[:n]
            # While faulty rows are fewer than half, they cannot move the median out of the range of the honest
            # distances.
            radius = float(distances.quantile(0.5)) if self.radius == "auto" else self.radius
            pull = shares * torch.where(distances > radius, radius / distances, 1.0)
            # v + Σ pᵢ(xᵢ − v), written as weights on v and on the rows.
            a = (1 - pull.sum()) * a
            a[:n] += pull
        return a
