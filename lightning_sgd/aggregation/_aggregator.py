"""The base classes of robust rules: a matrix that mixes the rows, then a function of each column.

A rule that looks at geometry maps the n × n Gram matrix of the workers' vectors to n weights (:class:`GramRule`); a
rule that looks at single coordinates maps an (n, s) block of columns to (s,) (:class:`CoordinateRule`). Neither ever
sees whole vectors, so the same object serves one process, and ranks that hold a block of columns each:

    kept, f = rule.keep(squared_row_norms(rows))           # a shard's norms add up over the ranks
    matrix = rule.mixing(row_gram(rows[kept], rule.reference), f)   # so do its Gram matrices
    result = rule.reduce(combine(matrix, block[kept]), f)  # any block of columns
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_sgd._validation import Words, expect, plain_number
from lightning_sgd.functional.robust.stacked_rows import (
    BLOCK,
    Rows,
    check_rows,
    column_blocks,
    combine,
    median_row,
    row_gram,
    squared_row_norms,
    usable_rows,
)


@dataclass(frozen=True, slots=True)
class AggregationReport:
    """Findings of a rule in its last call; rows are numbered as they were passed.

    Attributes:
        dropped: Rows that were left out because they are not finite or far too long.
        weights: Share of each row in the result, of shape (n,), zero for dropped rows. For a rule that continues
            coordinate by coordinate: its mean share in the mixed rows. ``None`` for rules without a Gram matrix.
        top_eigenvalue: Top eigenvalue of the covariance under these weights [λ]; spectral filter only.
    """

    dropped: tuple[int, ...] = ()
    weights: Tensor | None = None
    top_eigenvalue: float | None = None


class Aggregator(ABC):
    """A rule that combines the vectors of n workers of which some may be arbitrary; call it with an (n, d) tensor.

    Args:
        num_byzantine: How many of the workers may be faulty [f], fewer than half.

    Attributes:
        needs_gram: Whether the rule looks at the Gram matrix; if not, :meth:`mixing` is not called.
        centred: Whether one row may be subtracted from all others before the Gram matrix is computed. True for rules
            that use distances, false for rules that use norms.
        reference: Number of that row among the kept rows; ``None`` if nothing is to be subtracted.
        uses_previous_output: Whether the caller appends its previous result, at first zeros, as one more row.
        report: Findings of the last call.
    """

    needs_gram: bool = True
    centred: bool = True
    uses_previous_output: bool = False

    def __init__(self, num_byzantine: int) -> None:
        remedy = "It is the number of workers that may be faulty."
        num_byzantine = plain_number(num_byzantine)
        is_count = isinstance(num_byzantine, int) and num_byzantine >= 0
        expect(is_count, "num_byzantine", "a whole number from 0", num_byzantine, remedy)
        self.num_byzantine = num_byzantine
        self.worker_weights: tuple[float, ...] | None = None
        self.report = AggregationReport()
        self.reference: int | None = 0 if self.centred else None
        self._kept: Sequence[int] | None = None
        self._num_rows = 0
        self._previous: Tensor | None = None

    def _weigh_workers(self, weights: Sequence[float] | None) -> None:
        """Set one weight per worker; called by the rules that support it."""
        remedy = "Leave a worker out instead."
        positive = weights is None or all(0 < weight < math.inf for weight in weights)
        expect(positive, "worker_weights", "positive numbers", weights, remedy)
        self.worker_weights = None if weights is None else tuple(weights)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(num_byzantine={self.num_byzantine})"

    @torch.no_grad()
    def __call__(self, rows: Rows) -> Tensor:
        """Combine the rows.

        Args:
            rows: Matrix of shape (n, d), or n vectors of length d.

        Returns:
            Vector of length d.

        Raises:
            ValueError: If there are too few rows for ``num_byzantine``, or more rows than that are not finite.
        """
        rows = check_rows(rows)
        kept, num_byzantine = self.keep(squared_row_norms(rows))
        if len(kept) < len(rows):
            # A list of views: indexing the matrix would copy all rows.
            rows = [rows[index] for index in kept]
        if self.uses_previous_output:
            rows = [*rows, self._previous_or_zeros(rows[0])]
        matrix = (
            self.mixing(row_gram(rows, self.reference), num_byzantine) if self.needs_gram else None
        )
        # By blocks of columns, so that mixed rows never exist as a whole.
        result = torch.empty_like(rows[0])
        for columns, block in column_blocks(rows, BLOCK):
            mixed = block if matrix is None else combine(matrix, block)
            result[columns] = self.reduce(mixed, num_byzantine)
        if self.uses_previous_output:
            # A copy: the caller may scale the result in place.
            self._previous = result.clone()
        return result

    def check(self, num_rows: int) -> None:
        """Refuse a number of rows for which the rule has no guarantee.

        Args:
            num_rows: Number of workers [n].

        Raises:
            ValueError: If half of them or more may be faulty.
        """
        remedy = f"Of {num_rows} workers at most {max(0, (num_rows - 1) // 2)} may be faulty."
        enough = 2 * self.num_byzantine < num_rows
        expect(enough, "num_byzantine", f"less than {num_rows}/2", self.num_byzantine, remedy)
        known = num_rows if self.worker_weights is None else len(self.worker_weights)
        expect(
            known == num_rows,
            "worker_weights",
            f"{num_rows} numbers",
            known,
            "Give one per worker.",
        )

    def keep(self, squared_norms: Tensor) -> tuple[list[int], int]:
        """Begin a call: choose the rows to compute with.

        Args:
            squared_norms: Squared norm of each row, of shape (n,), not finite where the row is not.

        Returns:
            Numbers of the rows to keep, and how many of these may still be faulty.

        Raises:
            ValueError: If there are too few rows, or more than ``num_byzantine`` are not finite.
        """
        n = len(squared_norms)
        self.check(n)
        kept = usable_rows(squared_norms, self.num_byzantine)
        dropped = tuple(sorted(set(range(n)) - set(kept)))
        expected = f"finite but for {self.num_byzantine}"
        remedy = (
            f"Rows {list(dropped)} hold NaN or infinity; find out why, or raise `num_byzantine`."
        )
        expect(
            len(dropped) <= self.num_byzantine,
            "rows",
            expected,
            Words(f"{len(dropped)} that are not"),
            remedy,
        )
        self._begin(kept, n)
        # The row of median norm is not an outlier as long as fewer than half are: subtracting it loses no digits.
        self.reference = median_row(squared_norms[kept]) if self.centred else None
        self.report = AggregationReport(dropped=dropped)
        # A dropped row counts as one of the faulty ones, so the rule has to expect fewer among the others.
        return kept, self.num_byzantine - len(dropped)

    def _begin(self, kept: Sequence[int] | None, num_rows: int) -> None:
        self._kept, self._num_rows = kept, num_rows

    def mixing(self, gram: Tensor, num_byzantine: int) -> Tensor:
        """Compute the matrix by which the rows are multiplied before :meth:`reduce`.

        Args:
            gram: Inner products of the kept rows less the ``reference``, of shape (n, n), in double precision, on the
                CPU; with the previous output as the last row where the rule uses it.
            num_byzantine: How many of these rows may be faulty.

        Returns:
            Matrix of shape (m, n) in double precision.
        """
        # Norms are taken in double precision, products in the type of the rows: these can overflow first.
        finite = bool(gram.isfinite().all())
        remedy = "Scale the gradients down, or raise `num_byzantine`."
        expect(finite, "rows", "short enough for inner products", Words("overflow"), remedy)
        matrix = self._matrix(gram, num_byzantine)
        self.report = replace(
            self.report, weights=self._on_all_rows(matrix), top_eigenvalue=self._top_eigenvalue()
        )
        return matrix

    def _on_all_rows(self, matrix: Tensor) -> Tensor:
        """Return the mean share of each row, with zeros for dropped rows and without the previous output."""
        # A matrix of several rows is reduced coordinate by coordinate afterwards, so only mean shares are known.
        shares = matrix.mean(dim=0)
        if self._kept is None:
            return shares
        weights = torch.zeros(self._num_rows, dtype=matrix.dtype)
        weights[list(self._kept)] = shares[: len(self._kept)]
        return weights

    def _workers(self, num_rows: int) -> list[int]:
        """Return the workers to which the rows of the Gram matrix belong."""
        return list(range(num_rows)) if self._kept is None else list(self._kept)

    @property
    def names_workers(self) -> bool:
        """Whether the result depends on which worker a row belongs to."""
        return self.worker_weights is not None

    def _shares(self, num_rows: int) -> Tensor:
        """Return the weights of these rows' workers, scaled to sum to one."""
        weights = torch.ones(num_rows, dtype=torch.float64)
        if self.worker_weights is not None:
            chosen = [self.worker_weights[worker] for worker in self._workers(num_rows)]
            weights = torch.tensor(chosen, dtype=torch.float64)
        return weights / weights.sum()

    def _top_eigenvalue(self) -> float | None:
        return None

    @abstractmethod
    def _matrix(self, gram: Tensor, num_byzantine: int) -> Tensor: ...

    @abstractmethod
    def reduce(self, block: Tensor, num_byzantine: int) -> Tensor:
        """Combine mixed rows coordinate by coordinate.

        Args:
            block: Some columns of the mixed rows, of shape (m, s).
            num_byzantine: How many rows may be faulty.

        Returns:
            Tensor of shape (s,).
        """

    def _previous_or_zeros(self, like: Tensor) -> Tensor:
        # Converted, because a checkpoint may have brought it to another device.
        return torch.zeros_like(like) if self._previous is None else self._previous.to(like)

    def state_dict(self) -> dict[str, object]:
        """Return the state that the next call depends on."""
        return {} if self._previous is None else {"previous": self._previous}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Restore what :meth:`state_dict` returned.

        Args:
            state: Result of :meth:`state_dict`.
        """
        previous = state.get("previous")
        self._previous = previous.clone() if isinstance(previous, Tensor) else None


class GramRule(Aggregator):
    """A rule whose result is a weighted mean of the rows; subclasses implement ``weights``."""

    @abstractmethod
    def weights(self, gram: Tensor, num_byzantine: int) -> Tensor:
        """Compute the weight of each row, of shape (n,) in double precision.

        Args:
            gram: Inner products of the rows less the ``reference``, of shape (n, n) in double precision.
            num_byzantine: How many of these rows may be faulty.
        """

    def _matrix(self, gram: Tensor, num_byzantine: int) -> Tensor:
        return self.weights(gram, num_byzantine)[None]

    def reduce(self, block: Tensor, num_byzantine: int) -> Tensor:
        """Return the only row: the weighted mean."""
        return block[0]


class CoordinateRule(Aggregator):
    """A rule that combines every coordinate by itself; subclasses implement ``reduce``."""

    needs_gram = False

    def _matrix(self, gram: Tensor, num_byzantine: int) -> Tensor:
        return torch.eye(len(gram), dtype=gram.dtype)
