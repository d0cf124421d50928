"""A robust rule over ranks that hold a part of the columns each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lightning_sgd._validation import expect
from lightning_sgd.aggregation import Aggregator
from lightning_sgd.functional.distributed.flat_gradients import FlatGradients
from lightning_sgd.functional.robust.stacked_rows import (
    BLOCK,
    Rows,
    column_blocks,
    combine,
    median_row,
    row_gram,
    squared_row_norms,
)
from lightning_sgd.strategies._comm.all_to_all import AllToAll
from lightning_sgd.strategies._comm.collectives import Purpose


@dataclass(frozen=True)
class StepReport:
    """What a rule made of the rows of all workers in one step.

    Attributes:
        step: Optimizer steps before it; ``None`` if there was none.
        num_workers: Number of rows [N].
        weights: Share of each worker in the result, of shape (N,); ``None`` for rules that look at coordinates
            in the end.
        dropped: Workers whose rows were not finite, or far too long.
        absent: Workers without a gradient.
        top_eigenvalue: Of the covariance under the weights, of the spectral filter alone.
        distances: Of each row from the result, of shape (N,), where they were asked for.
    """

    step: int | None = None
    num_workers: int = 0
    weights: Tensor | None = None
    dropped: tuple[int, ...] = ()
    absent: tuple[int, ...] = ()
    top_eigenvalue: float | None = None
    distances: Tensor | None = None


@dataclass(frozen=True)
class Plan:
    """How the columns of one step are combined; the same on all ranks.

    Attributes:
        kept: Rows that take part.
        num_byzantine: How many of these may be faulty.
        matrix: By which they are multiplied first, if at all.
    """

    kept: Sequence[int]
    num_byzantine: int
    matrix: Tensor | None


@dataclass
class Rejected:
    """Why there is no result.

    Attributes:
        faulty: Workers whose rows are not finite.
        reason: In words.
    """

    faulty: Sequence[int]
    reason: str


@dataclass
class ShardedRule:
    """Decides on all ranks alike what to do with the rows, from sums over the ranks of norms and inner products.

    Norms and inner products travel together: each rank subtracts from its columns the row whose norm there is the
    median, which does not change distances. So a row that is not finite spoils its own inner products only, which are
    left out once all ranks know of it.

    Args:
        rule: Combines the rows.
        drops_more: Whether rows that are not finite are left out also where they are more than the rule expects.
    """

    rule: Aggregator
    drops_more: bool = True
    report: StepReport = field(default_factory=StepReport)
    previous: Tensor | None = None  # the last result, whole, for rules that go on from it

    def decide(
        self,
        columns: Tensor,
        absent: Sequence[int],
        previous: Tensor | None,
        exchange: AllToAll | None,
        step: int,
    ) -> Plan | Rejected:
        """What to do with the rows.

        Args:
            columns: This rank's part of all rows, of shape (N, s).
            absent: For each rank, how many of its rows are no gradients.
            previous: This rank's part of the last result, for rules that go on from it.
            exchange: Between the ranks.
            step: Optimizer steps so far.
        """
        norms, gram = self._measure(columns, previous, exchange, step)
        missing, faulty = _sort_out(norms, absent)
        f = self.rule.num_byzantine
        self.report = StepReport(step, len(norms), dropped=tuple(faulty), absent=tuple(missing))
        if len(faulty) + len(missing) == len(norms):
            return Rejected(faulty, "no worker has a finite gradient")
        if len(faulty) > f and not self.drops_more:
            return Rejected(faulty, f"workers {faulty} have gradients that are not finite")
        # The rule expects as many faulty rows as it was told; it sees no more of them than that.
        passed = [i for i in range(len(norms)) if i not in {*missing, *faulty[f:]}]
        if missing and not self._is_enough(len(passed)):
            return Rejected(
                faulty, f"workers {missing} have no gradient, and the others are too few"
            )
        kept, left = self.rule.keep(norms[passed])
        plan = self._plan([passed[index] for index in kept], left, gram)
        self._take_note(passed, missing, plan)
        return plan

    def _measure(
        self,
        columns: Tensor,
        previous: Tensor | None,
        exchange: AllToAll | None,
        step: int,
    ) -> tuple[Tensor, Tensor]:
        norms = squared_row_norms(columns)
        rows: Rows = columns if previous is None else [*columns, previous]
        gram = (
            row_gram(rows, self._reference(norms)) if self.rule.needs_gram else norms.new_empty(0)
        )
        if exchange is None:
            return norms, gram
        sums = exchange.total(torch.cat([norms, gram.flatten()]), Purpose.GRADIENTS, step)
        return sums[: len(norms)], sums[len(norms) :].view(gram.shape)

    def _reference(self, norms: Tensor) -> int | None:
        if not self.rule.centred:
            return None
        # Ranks may choose different rows: each part loses the same from all rows, which is one common shift of them.
        finite = norms.isfinite().nonzero().flatten()
        return int(finite[median_row(norms[finite])]) if len(finite) else 0

    def _is_enough(self, num_rows: int) -> bool:
        try:
            self.rule.check(num_rows)
        except ValueError:
            return False
        return True

    def _plan(self, kept: Sequence[int], num_byzantine: int, gram: Tensor) -> Plan:
        if not self.rule.needs_gram:
            return Plan(kept, num_byzantine, None)
        chosen = [*kept, len(gram) - 1] if self.rule.uses_previous_output else list(kept)
        matrix = self.rule.mixing(gram[chosen][:, chosen], num_byzantine)
        return Plan(kept, num_byzantine, matrix)

    def _take_note(self, passed: Sequence[int], missing: Sequence[int], plan: Plan) -> None:
        found, weights, num_rows = self.rule.report, None, self.report.num_workers
        is_final = plan.matrix is not None and len(plan.matrix) == 1
        if found.weights is not None and is_final:
            weights = torch.zeros(num_rows, dtype=torch.float64)
            weights[list(passed)] = found.weights[: len(passed)]
        dropped = {passed[index] for index in found.dropped}
        taken = {*passed, *missing} - dropped
        self.report = replace(
            self.report,
            weights=weights,
            dropped=tuple(index for index in range(num_rows) if index not in taken),
            top_eigenvalue=found.top_eigenvalue,
        )

    def carry_out(self, plan: Plan, columns: Tensor, previous: Tensor | None) -> Tensor:
        """Combine columns as decided.

        Args:
            plan: From :meth:`decide`.
            columns: Some columns of all rows, of shape (N, s).
            previous: The same columns of the last result, for rules that go on from it.

        Returns:
            Tensor of shape (s,).
        """
        rows: Rows = columns
        if len(plan.kept) < len(columns) or previous is not None:
            kept = [columns[index] for index in plan.kept]
            rows = kept if previous is None else [*kept, previous]
        result = torch.empty_like(columns[0])
        for where, block in column_blocks(rows, BLOCK):
            mixed = block if plan.matrix is None else combine(plan.matrix, block)
            result[where] = self.rule.reduce(mixed, plan.num_byzantine)
        return result

    def remember(self, result: Tensor) -> None:
        """Keep the result, whole, if the rule goes on from it.

        Args:
            result: Of all ranks together.
        """
        if self.rule.uses_previous_output:
            self.previous = result.clone()

    def part_of_previous(self, gradients: FlatGradients, index: int) -> Tensor | None:
        """A part of the last result, at first zeros, for rules that go on from it.

        Args:
            gradients: Say how long the parts are.
            index: Number of the part.
        """
        if not self.rule.uses_previous_output:
            return None
        whole = torch.zeros_like(gradients.rows[0])
        if self.previous is not None:
            known = self.previous[: gradients.numel].to(whole)
            whole[: len(known)] = known
        return whole.view(gradients.num_shards, -1)[index]

    def state_dict(self) -> dict[str, Any]:
        """What the next step depends on; the same on all ranks."""
        state: dict[str, Any] = {"rule": self.rule.state_dict()}
        return state if self.previous is None else {**state, "previous": self.previous}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`.

        Args:
            state: What it returned.
        """
        self.rule.load_state_dict(state["rule"])
        self.previous = state.get("previous")


def _sort_out(norms: Tensor, absent: Sequence[int]) -> tuple[list[int], list[int]]:
    """Rows that are no gradients, and others that are not finite."""
    missing, faulty = [], []
    rows_per_rank = len(norms) // len(absent)
    for rank, num_absent in enumerate(absent):
        begin = rank * rows_per_rank
        broken = [i for i in range(begin, begin + rows_per_rank) if not norms[i].isfinite()]
        missing += broken[:num_absent]
        faulty += broken[num_absent:]
    return missing, faulty


def squared_distances_from(columns: Tensor, point: Tensor) -> Tensor:
    """Squared distance of each row from a point, of shape (N,), in double precision on the CPU.

    Args:
        columns: Of shape (N, s).
        point: Of shape (s,).
    """
    total = torch.zeros(len(columns), dtype=torch.float64)
    for where, block in column_blocks(columns):
        total += (block - point[where]).double().square().sum(dim=1).cpu()
    return total


def refuse_too_few(rule: Aggregator, num_workers: int, unit: str) -> None:
    """Raise if the rule promises nothing for so many workers.

    Args:
        rule: Combines the rows.
        num_workers: Number of rows in a step.
        unit: What a worker is.
    """
    expect(
        2 * rule.num_byzantine < num_workers,
        "num_byzantine",
        f"less than half of {num_workers} {unit}",
        rule.num_byzantine,
        f"Use at least {2 * rule.num_byzantine + 1} workers, or expect fewer faulty ones.",
    )
    rule.check(num_workers)
