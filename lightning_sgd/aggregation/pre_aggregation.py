"""Linear maps of the rows before a rule; their matrices compose."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Literal, cast

import torch
from torch import Tensor

from lightning_sgd._validation import expect, is_finite_at_least
from lightning_sgd.aggregation._draws import Draws
from lightning_sgd.functional.robust.stacked_rows import (
    Rows,
    check_rows,
    column_blocks,
    combine,
    median_row,
    row_gram,
    squared_distances,
    squared_row_norms,
)


class PreAggregator(ABC):
    """A linear map of n rows to m rows that depends on their Gram matrix.

    Attributes:
        looks_at: The part of the Gram matrix that is needed. Distances allow to subtract any vector from all rows
            first; norms do not.
        keeps_workers: Whether row i of the result still belongs to worker i.
    """

    looks_at: Literal["distances", "norms", "nothing"] = "distances"
    keeps_workers: bool = True

    @abstractmethod
    def matrix(self, gram: Tensor, num_byzantine: int) -> Tensor:
        """Compute the map, of shape (m, n) in double precision.

        Args:
            gram: Inner products of the rows, of shape (n, n) in double precision.
            num_byzantine: How many rows may be faulty [f].
        """

    def num_rows(self, num_rows: int) -> int:
        """Return the number of mapped rows [m].

        Args:
            num_rows: Number of rows before [n].
        """
        return num_rows

    @torch.no_grad()
    def __call__(self, rows: Rows, num_byzantine: int = 0, *, out: Tensor | None = None) -> Tensor:
        """Map the rows, to shape (m, d).

        Args:
            rows: Finite matrix of shape (n, d), or n vectors of length d.
            num_byzantine: How many rows may be faulty [f].
            out: Where to write the result, of its shape and type, not overlapping the rows; by default new memory,
                whose first use takes about as long as the computation.
        """
        rows = check_rows(rows)
        matrix = self.matrix(self._gram(rows), num_byzantine)
        shape = len(matrix), rows[0].numel()
        result = rows[0].new_empty(shape) if out is None else _checked(out, shape, rows[0].dtype)
        for columns, block in column_blocks(rows):
            # Blocks of half precision are converted for the product, so it cannot write to the result.
            if block.dtype == result.dtype:
                combine(matrix, block, out=result[:, columns])
            else:  # half precision
                result[:, columns] = combine(matrix, block)
        return result

    def _gram(self, rows: Rows) -> Tensor:
        """Compute the part of the Gram matrix that is needed."""
        if self.looks_at == "nothing":
            return torch.zeros(len(rows), len(rows), dtype=torch.float64)
        if self.looks_at == "norms":
            return squared_row_norms(rows).diag()
        _, first = next(column_blocks(rows))  # enough to see which row is not an outlier
        return row_gram(rows, median_row(squared_row_norms(first)))

    def state_dict(self) -> dict[str, object]:
        """Return the state that the next call depends on."""
        return {}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Restore what :meth:`state_dict` returned.

        Args:
            state: Result of :meth:`state_dict`.
        """
        expect(not state, "state", "empty", dict(state), "It belongs to another pre-aggregation.")

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class NNM(PreAggregator):
    r"""Nearest-neighbour mixing: every row becomes the mean of the n − f rows nearest to it, itself among them.

    It makes rules that suffer from data that differ among workers, such as the median, far better: κ becomes at most
    8f/(n − f)·(κ + 1). Before a rule on the Gram matrix it costs nothing: the weights are those of the rule, mixed.

    Cost: one Gram matrix, and one n × n product per block of columns where the rule looks at coordinates.

    Example:
        >>> NNM()(torch.tensor([[0.0], [1.0], [9.0]]), num_byzantine=1).flatten()
        tensor([0.5000, 0.5000, 5.0000])

    Reference:
        Youssef Allouah et al. Fixing by Mixing: A Recipe for Optimal Byzantine ML under Heterogeneity. AISTATS 2023.
    """

    def matrix(self, gram: Tensor, num_byzantine: int) -> Tensor:
        """Return 1/(n − f) for the nearest rows of each row; of equally near rows those of lower number."""
        num_nearest = len(gram) - num_byzantine
        distances = squared_distances(gram).fill_diagonal_(
            -1.0
        )  # itself first, whatever else is as near
        nearest = distances.argsort(dim=1, stable=True)[:, :num_nearest]
        return torch.zeros_like(gram).scatter_(1, nearest, 1 / num_nearest)


class Bucketing(PreAggregator):
    """Means of ``bucket_size`` rows each, in a random order that is drawn anew for every call.

    The rule after it gets ⌈n/s⌉ rows, of which as many as before may be faulty, so it needs ⌈n/s⌉ > 2f.

    Cost: nothing before a rule on the Gram matrix.

    Args:
        bucket_size: Rows per bucket [s]; the last one may hold fewer.
        seed: Of the order; the same on all ranks.

    Example:
        >>> Bucketing(bucket_size=2)(torch.tensor([[1.0], [2.0], [3.0], [4.0]])).mean()
        tensor(2.5000)

    Reference:
        Sai Praneeth Karimireddy, Lie He, Martin Jaggi. Byzantine-Robust Learning on Heterogeneous Datasets via
        Bucketing. ICLR 2022.
    """

    looks_at = "nothing"
    keeps_workers = False

    def __init__(self, bucket_size: int = 2, seed: int = 0) -> None:
        remedy = "Two is the usual choice."
        expect(bucket_size >= 1, "bucket_size", "at least 1", bucket_size, remedy)
        self.bucket_size, self.draws = bucket_size, Draws(seed)

    def num_rows(self, num_rows: int) -> int:
        """Return ⌈n/s⌉."""
        return -(-num_rows // self.bucket_size)

    def matrix(self, gram: Tensor, num_byzantine: int) -> Tensor:
        """Return, for each bucket, the reciprocal of its size in the columns of its members."""
        n = len(gram)
        # Seeded by the number of the call, so that all ranks draw the same buckets without a message.
        order = torch.randperm(n, generator=self.draws.next_generator())
        buckets = torch.split(order, self.bucket_size)
        matrix = torch.zeros(len(buckets), n, dtype=gram.dtype)
        for row, members in zip(matrix, buckets, strict=True):
            row[members] = 1 / len(members)
        return matrix

    def state_dict(self) -> dict[str, object]:
        """Return the number of calls."""
        return {"draws": self.draws.state_dict()}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Restore what :meth:`state_dict` returned.

        Args:
            state: Result of :meth:`state_dict`.
        """
        self.draws.load_state_dict(cast("Mapping[str, int]", state["draws"]))

    def __repr__(self) -> str:
        return f"Bucketing(bucket_size={self.bucket_size})"


class Clip(PreAggregator):
    r"""Rows no longer than ``radius``: :math:`x_i \min(1, c / \lVert x_i \rVert)`.

    Cost: norms; a Gram matrix where a rule comes after it.

    Args:
        radius: Largest norm [c], of gradients that no loss scale multiplies.

    Example:
        >>> Clip(radius=5.0)(torch.tensor([[3.0, 4.0], [6.0, 8.0]]))
        tensor([[3., 4.],
                [3., 4.]])
    """

    looks_at = "norms"

    def __init__(self, radius: float) -> None:
        fits = is_finite_at_least(radius, 0.0) and radius > 0
        expect(fits, "radius", "a positive number", radius, "ARC finds one by itself.")
        self.radius = radius

    def matrix(self, gram: Tensor, num_byzantine: int) -> Tensor:
        """Return a diagonal matrix."""
        return _shortened(gram, self.radius)

    def __repr__(self) -> str:
        return f"Clip(radius={self.radius})"


class ARC(PreAggregator):
    """Adaptive robust clipping: the ⌊2f(n − f)/n⌋ longest rows are shortened to the length of the next one.

    Cost: norms; a Gram matrix where a rule comes after it.

    Example:
        >>> ARC()(torch.tensor([[1.0], [2.0], [4.0], [64.0]]), num_byzantine=1).flatten()
        tensor([1., 2., 4., 4.])

    Reference:
        Youssef Allouah, Rachid Guerraoui, Nirupam Gupta, Ahmed Jellouli, Geovani Rizk, John Stephan. Adaptive Gradient
        Clipping for Robust Federated Learning. ICLR 2025.
    """

    looks_at = "norms"

    def matrix(self, gram: Tensor, num_byzantine: int) -> Tensor:
        """Return a diagonal matrix."""
        n = len(gram)
        # ⌊2(f/n)(n − f)⌋ in whole numbers: a floating-point product could fall just below one.
        num_clipped = 2 * num_byzantine * (n - num_byzantine) // n
        norms = gram.diagonal().sqrt().sort().values
        # The length of the longest row that is not clipped.
        return _shortened(gram, float(norms[n - num_clipped - 1]))


def _checked(out: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    found = tuple(out.shape), out.dtype
    expect(
        found == (shape, dtype),
        "out",
        f"of {shape} {dtype}",
        found,
        "Leave it out to get a new one.",
    )
    return out


def _shortened(gram: Tensor, radius: float) -> Tensor:
    norms = gram.diagonal().sqrt()
    return torch.where(norms > radius, radius / norms, 1.0).diag()
