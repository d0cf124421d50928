"""A rule with pre-aggregations before it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor

from lightning_sgd._validation import expect
from lightning_sgd.aggregation._aggregator import Aggregator
from lightning_sgd.aggregation.pre_aggregation import PreAggregator


class PreAggregated(Aggregator):
    """A rule after one or more linear maps of the rows, by matrix products alone.

    After a step with the matrix M the Gram matrix is :math:`M G M^T`; the rows themselves are mixed once, by the
    product of all matrices.

    Args:
        steps: The pre-aggregations, in this order.
        rule: The rule that combines the mapped rows.

    Example:
        >>> from lightning_sgd.aggregation import NNM, CoordinateMedian
        >>> rows = torch.tensor([[0.0], [1.0], [0.5], [0.5], [99.0]])
        >>> PreAggregated([NNM()], CoordinateMedian(1))(rows)
        tensor([0.5000])
    """

    def __init__(self, steps: Sequence[PreAggregator], rule: Aggregator) -> None:
        self.steps, self.rule = list(steps), rule
        expect(bool(steps), "steps", "not empty", steps, "Use the rule by itself.")
        remedy = "It mixes workers; use NNM, or a rule that treats all workers equally."
        named = all(step.keeps_workers for step in self.steps) or not rule.names_workers
        expect(named, "steps", "such that rows still belong to workers", self.steps, remedy)
        self.uses_previous_output = rule.uses_previous_output
        self.centred = rule.centred and all(step.looks_at != "norms" for step in self.steps)
        super().__init__(rule.num_byzantine)

    def __repr__(self) -> str:
        return " + ".join(map(repr, [*self.steps, self.rule]))

    def check(self, num_rows: int) -> None:
        """Refuse a number of rows for which the rule, after the steps, has no guarantee."""
        super().check(num_rows)
        for step in self.steps:
            num_rows = step.num_rows(num_rows)
        self.rule.check(num_rows)

    def _begin(self, kept: Sequence[int] | None, num_rows: int) -> None:
        super()._begin(kept, num_rows)
        # Behind buckets a row belongs to no worker: the rule must not look up weights or a trusted worker by number.
        by_worker = all(step.keeps_workers for step in self.steps)
        self.rule._begin(kept if by_worker else None, num_rows)

    def _matrix(self, gram: Tensor, num_byzantine: int) -> Tensor:
        product = torch.eye(len(gram), dtype=gram.dtype)
        for step in self.steps:
            matrix = self._step_matrix(step, gram, num_byzantine)
            # Mapped rows MX have the Gram matrix MGMᵀ, so that they never exist as a whole.
            gram, product = matrix @ gram @ matrix.mT, matrix @ product
        return self.rule._matrix(gram, num_byzantine) @ product

    def _step_matrix(self, step: PreAggregator, gram: Tensor, num_byzantine: int) -> Tensor:
        if not self.uses_previous_output:
            return step.matrix(gram, num_byzantine)
        # The previous output, in the last row, is no worker: the steps leave it as it is.
        of_workers = step.matrix(gram[:-1, :-1], num_byzantine)
        matrix = gram.new_zeros(len(of_workers) + 1, len(gram))
        matrix[:-1, :-1] = of_workers
        matrix[-1, -1] = 1.0
        return matrix

    def _top_eigenvalue(self) -> float | None:
        return self.rule._top_eigenvalue()

    def reduce(self, block: Tensor, num_byzantine: int) -> Tensor:
        """Combine mixed rows by the rule."""
        return self.rule.reduce(block, num_byzantine)

    def state_dict(self) -> dict[str, object]:
        """Return the states of the steps and of the rule."""
        return {
            **super().state_dict(),
            "steps": [step.state_dict() for step in self.steps],
            "rule": self.rule.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Restore what :meth:`state_dict` returned.

        Args:
            state: Result of :meth:`state_dict`.
        """
        super().load_state_dict(state)
        states = cast("Sequence[Mapping[str, object]]", state["steps"])
        for step, its_state in zip(self.steps, states, strict=True):
            step.load_state_dict(its_state)
        self.rule.load_state_dict(cast("Mapping[str, object]", state["rule"]))
