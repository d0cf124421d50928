"""A table of weights from which indices are drawn in proportion, and which may change between draws."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_sgd._validation import expect

Floats: TypeAlias = NDArray[np.float64]
Indices: TypeAlias = NDArray[np.int64]


class SumTree:
    r"""Draw indices in proportion to weights that may change between draws, in a time that hardly grows with them.

    A binary heap of sums in double precision: node k holds the sum of nodes 2k and 2k + 1, the leaves hold the
    weights. The top ``num_top`` sums are searched at once by their running sums, the levels below one by one for all
    draws together. Parents are recomputed from their children and never corrected by differences, so sums do not
    drift.

    A mass :math:`u \in [0, V)` belongs to the first leaf whose running sum exceeds it. A leaf of weight 0 is never
    found.

    Cost: 16 bytes for each of the next power of two ≥ ``num_leaves``; a draw or an update of b indices takes about
    :math:`b \log_2(N / \mathtt{num\_top})` operations, without compiled code.

    Args:
        num_leaves: Number of weights [N]; all are 0 at first.
        num_top: How many sums at the top are searched at once; 1 for a plain binary tree.

    Raises:
        ValueError: If an argument is not positive, or a weight is negative or not finite.

    Example:
        >>> tree = SumTree(4)
        >>> tree.set(torch.tensor([0, 2]), torch.tensor([1.0, 3.0]))
        >>> tree.total
        4.0
        >>> tree.find(torch.tensor([0.0, 0.9, 1.0, 3.9]))
        tensor([0, 0, 2, 2])
        >>> indices, probabilities = tree.sample(2, torch.Generator().manual_seed(0))
        >>> probabilities == torch.where(indices == 0, 0.25, 0.75)
        tensor([True, True])
    """

    def __init__(self, num_leaves: int, num_top: int = 1024) -> None:
        expect(num_leaves >= 1, "num_leaves", "at least 1", num_leaves, "Give one leaf per sample.")
        expect(num_top >= 1, "num_top", "at least 1", num_top, "The default is fast.")
        self.num_leaves = num_leaves
        self._capacity = 1 << (num_leaves - 1).bit_length()
        self._num_top = 1 << (min(num_top, self._capacity).bit_length() - 1)
        self._nodes: Floats = np.zeros(2 * self._capacity)
        self._left, self._right = self._nodes[0::2], self._nodes[1::2]
        self._leaves = self._nodes[self._capacity : self._capacity + num_leaves]
        self._num_levels = (self._capacity // self._num_top).bit_length() - 1
        self._running: Floats | None = None

    @property
    def total(self) -> float:
        """The sum of all weights [V]."""
        return float(self._running_sums()[-1])

    @property
    def weights(self) -> Tensor:
        """All weights, of shape (N,), float64; a view that must not be written to."""
        return torch.from_numpy(self._leaves)

    def get(self, indices: Tensor) -> Tensor:
        """Return the weights of these leaves, float64."""
        return torch.from_numpy(self._leaves[_indices(indices)])

    def set(self, indices: Tensor, weights: Tensor) -> None:
        """Give leaves new weights; of an index that comes twice the last weight counts.

        Args:
            indices: Leaves, of shape (b,).
            weights: Their weights, of shape (b,), ≥ 0.
        """
        where, new = _indices(indices), _floats(weights)
        if not len(where):
            return
        _refuse_bad(new)
        first, last = where.min(), where.max()
        if first < 0 or last >= self.num_leaves:
            expected = f"in [0, {self.num_leaves})"
            expect(False, "indices", expected, [int(first), int(last)], "Give numbers of samples.")
        self.set_array(where, new)

    def set_array(self, indices: Indices, weights: Floats) -> None:
        """Set weights as :meth:`set` does, from NumPy arrays that need no check.

        Args:
            indices: Numbers of leaves.
            weights: Their weights.
        """
        nodes = indices + self._capacity
        self._nodes[nodes] = weights
        for _ in range(self._num_levels):
            nodes >>= 1
            self._nodes[nodes] = self._left[nodes] + self._right[nodes]
        self._running = None

    def rebuild(self, weights: Tensor) -> None:
        """Give all leaves new weights.

        Args:
            weights: Of shape (N,), ≥ 0.
        """
        new = _floats(weights)
        expect(
            new.shape == (self.num_leaves,),
            "weights",
            f"of shape ({self.num_leaves},)",
            tuple(new.shape),
            "Give one for each leaf.",
        )
        _refuse_bad(new)
        self._leaves[:] = new
        end = self._capacity
        for _ in range(self._num_levels):
            self._nodes[end // 2 : end] = self._left[end // 2 : end] + self._right[end // 2 : end]
            end //= 2
        self._running = None

    def find(self, masses: Tensor) -> Tensor:
        """Find the leaf of each mass in [0, V); masses beyond the ends belong to the leaves there."""
        return torch.from_numpy(self.find_array(_floats(masses)))

    def sample(
        self, num: int, generator: torch.Generator, stratified: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Draw with replacement.

        Args:
            num: Number of draws.
            generator: Source of randomness.
            stratified: Draw one from each of ``num`` equal parts of the mass, in order, which lowers the variance of
                sums over the draws.

        Returns:
            Indices, int64, and the probability of each in a single draw, float64.
        """
        expect(self.total > 0, "weights", "positive somewhere", self.total, "Set some first.")
        indices = self.find_array(uniform_numbers(num, generator, stratified) * self.total)
        return torch.from_numpy(indices), torch.from_numpy(self._leaves[indices] / self.total)

    def find_array(self, masses: Floats) -> Indices:
        """Find leaves as :meth:`find` does, for a NumPy array.

        Args:
            masses: In [0, V).
        """
        running = self._running_sums()
        left_over = np.minimum(np.maximum(masses, 0.0), np.nextafter(running[-1], 0.0))
        tops = np.searchsorted(running[1:], left_over, side="right").astype(np.int64, copy=False)
        left_over -= running[tops]
        tops += self._num_top
        leaves = self._descend(tops, left_over.copy(), is_careful=False)
        if not self._nodes[leaves].all():
            leaves = self._descend(tops, left_over, is_careful=True)
        leaves -= self._capacity
        return leaves

    def _descend(self, nodes: Indices, left_over: Floats, is_careful: bool) -> Indices:
        for _ in range(self._num_levels):
            left = self._left[nodes]
            goes_right = left_over >= left
            if (
                is_careful
            ):  # rounding may leave more mass than there is on the left, with nothing on the right
                goes_right &= self._right[nodes] > 0
            left_over -= left * goes_right
            nodes = 2 * nodes + goes_right
        return nodes.copy() if self._num_levels == 0 else nodes

    def _running_sums(self) -> Floats:
        if self._running is None:
            running = np.zeros(self._num_top + 1)
            np.cumsum(self._nodes[self._num_top : 2 * self._num_top], out=running[1:])
            self._running = running
        return self._running


def uniform_numbers(num: int, generator: torch.Generator, stratified: bool) -> Floats:
    """Draw numbers in [0, 1), float64; if ``stratified`` one from each of ``num`` equal parts, in order."""
    numbers: Floats = torch.rand(num, generator=generator, dtype=torch.float64).numpy()
    return (numbers + np.arange(num)) / num if stratified else numbers


def _indices(indices: Tensor) -> Indices:
    return np.asarray(indices.numpy(), dtype=np.int64)


def _floats(values: Tensor) -> Floats:
    array: NDArray[Any] = values.numpy()
    return np.asarray(array, dtype=np.float64)


def _refuse_bad(weights: Floats) -> None:
    smallest, largest = weights.min(), weights.max()
    if not (smallest >= 0 and largest < np.inf):  # also for NaN
        got = [float(smallest), float(largest)]
        remedy = "Replace NaN and Inf before."
        expect(False, "weights", "finite and not negative", got, remedy)
