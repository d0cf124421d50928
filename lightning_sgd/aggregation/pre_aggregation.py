"""What happens to the rows before a rule sees them: matrices that compose."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor

from lightning_sgd._validation import expect
from lightning_sgd.aggregation._aggregator import Aggregator
from lightning_sgd.functional.stacked_rows import (
    Rows,
    check_rows,
    column_blocks,
    combine,
    row_gram,
    squared_distances,
)


class PreAggregator(ABC):
    """A linear map of n rows to m rows that depends on their Gram matrix.

    Attributes:
        centred: Whether it may be given the Gram matrix of rows less one of them, as for matrices whose rows sum to
            one; if not, it looks at norms.
        keeps_workers: Whether row i of the result still belongs to worker i.
    """

    centred: bool = True
    keeps_workers: bool = True

    @abstractmethod
    def matrix(self, gram: Tensor, num_byzantine: int) -> Tensor:
        """The map, of shape (m, n) in double precision.

        Args:
            gram: Inner products of the rows, of shape (n, n) in double precision.
            num_byzantine: How many rows may be faulty [f].
        """

    def num_rows(self, num_rows: int) -> int:
        """How many rows come out [m].

        Args:
            num_rows: How many go in [n].
        """
        return num_rows

    @torch.no_grad()
    def __call__(self, rows: Rows, num_byzantine: int = 0) -> Tensor:
        """The mapped rows, of shape (m, d).

        Args:
            rows: Finite matrix of shape (n, d), or n vectors of length d.
            num_byzantine: How many rows may be faulty [f].
        """
        rows = check_rows(rows)
        matrix = self.matrix(row_gram(rows, 0 if self.centred else None), num_byzantine)
        result = rows[0].new_empty(len(matrix), rows[0].numel())
        for columns, block in column_blocks(rows):
            result[:, columns] = combine(matrix, block)
        return result

    def state_dict(self) -> dict[str, object]:
        """What the next call depends on."""
        return {}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Go on from a state.

        Args:
            state: What :meth:`state_dict` returned.
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
        """Each row holds 1/(n − f) for the nearest rows; of equally near ones those of lower number."""
        num_nearest = len(gram) - num_byzantine
        distances = squared_distances(gram).fill_diagonal_(
            -1.0
        )  # itself first, whatever else is as near
        nearest = distances.argsort(dim=1, stable=True)[:, :num_nearest]
        return torch.zeros_like(gram).scatter_(1, nearest, 1 / num_nearest)


class PreAggregated(Aggregator):
    """A rule after one or more maps of the rows, by matrix products alone.

    The Gram matrix that each step sees is :math:`M G M^T` of the one before; the rows are mixed once, by the product of
    all matrices.

    Args:
        steps: What is done to the rows first, in this order.
        rule: The rule that combines what comes out.

    Example:
        >>> from lightning_sgd.aggregation.coordinate import CoordinateMedian
        >>> rows = torch.tensor([[0.0], [1.0], [0.5], [0.5], [99.0]])
        >>> PreAggregated([NNM()], CoordinateMedian(1))(rows)
        tensor([0.5000])
    """

    def __init__(self, steps: Sequence[PreAggregator], rule: Aggregator) -> None:
        super().__init__(rule.num_byzantine)
        self.steps, self.rule = list(steps), rule
        expect(bool(steps), "steps", "not empty", steps, "Use the rule by itself.")
        remedy = "It mixes workers; use NNM, or a rule that takes all workers alike."
        named = all(step.keeps_workers for step in self.steps) or not rule.names_workers
        expect(named, "steps", "such that rows still belong to workers", self.steps, remedy)
        remedy = "Its previous output is a row of its own; put no step before it."
        expect(not rule.uses_previous_output, "rule", "one without a previous output", rule, remedy)
        self.needs_gram = True
        centred = all(step.centred for step in self.steps) and rule.reference is not None
        self.reference = 0 if centred else None

    def __repr__(self) -> str:
        return " + ".join(map(repr, [*self.steps, self.rule]))

    def check(self, num_rows: int) -> None:
        """Refuse numbers of rows for which the rule, after the steps, promises nothing."""
        super().check(num_rows)
        for step in self.steps:
            num_rows = step.num_rows(num_rows)
        self.rule.check(num_rows)

    def _begin(self, kept: Sequence[int] | None, num_rows: int) -> None:
        super()._begin(kept, num_rows)
        by_worker = all(step.keeps_workers for step in self.steps)
        self.rule._begin(kept if by_worker else None, num_rows)

    def _matrix(self, gram: Tensor, num_byzantine: int) -> Tensor:
        product = torch.eye(len(gram), dtype=gram.dtype)
        for step in self.steps:
            matrix = step.matrix(gram, num_byzantine)
            gram, product = matrix @ gram @ matrix.mT, matrix @ product
        return self.rule._matrix(gram, num_byzantine) @ product

    def _top_eigenvalue(self) -> float | None:
        return self.rule._top_eigenvalue()

    def reduce(self, block: Tensor, num_byzantine: int) -> Tensor:
        """What the rule does."""
        return self.rule.reduce(block, num_byzantine)

    def state_dict(self) -> dict[str, object]:
        """The states of the steps and of the rule."""
        return {
            "steps": [step.state_dict() for step in self.steps],
            "rule": self.rule.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Go on from a state.

        Args:
            state: What :meth:`state_dict` returned.
        """
        states = cast("Sequence[Mapping[str, object]]", state["steps"])
        for step, its_state in zip(self.steps, states, strict=True):
            step.load_state_dict(its_state)
        self.rule.load_state_dict(cast("Mapping[str, object]", state["rule"]))
