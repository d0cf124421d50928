"""A robust rule over ranks that hold one shard of the columns each."""

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
    """The result of a rule for the rows of all workers in one step.

    Attributes:
        step: Optimizer steps before it; ``None`` if there was none.
        num_workers: Number of rows [N].
        weights: Share of each worker in the result, of shape (N,); ``None`` for rules that end with coordinates.
        dropped: Workers whose rows were not finite, or far too long.
        absent: Workers without a gradient.
        top_eigenvalue: Largest eigenvalue of the weighted covariance, with the spectral filter only.
        distances: Distance of each row from the result, of shape (N,), if requested.
    """

    step: int | None = None
    num_workers: int = 0
    weights: Tensor | None = None
    dropped: tuple[int, ...] = ()
    absent: tuple[int, ...] = ()
    top_eigenvalue: float | None = None
    distances: Tensor | None = None


@dataclass(frozen=True)
class MixingPlan:
    """The decision how the columns of one step are combined; the same on all ranks.

    Attributes:
        kept: Indices of the rows that are combined.
        num_byzantine: Number of these that may be faulty.
        matrix: Matrix by which they are multiplied first, if any.
    """

    kept: Sequence[int]
    num_byzantine: int
    matrix: Tensor | None


@dataclass
class NoResult:
    """The reason why the rows of a step cannot be combined.

    Attributes:
        faulty: Workers whose rows are not finite.
        reason: The reason, in words.
    """

    faulty: Sequence[int]
    reason: str


@dataclass
class ShardedRule:
    """Makes the same decision on all ranks, from norms and inner products summed over the ranks.

    Norms and inner products are summed in one exchange. Each rank first subtracts from its columns the row whose norm
    there is the median, which does not change distances. A row that is not finite then affects only its own inner
    products, which are left out once all ranks know of it.

    Args:
        rule: Combines the rows.
        drops_more: Whether rows that are not finite are dropped also if there are more than the rule expects.
    """

    rule: Aggregator
    drops_more: bool = True
    report: StepReport = field(default_factory=StepReport)
    previous: Tensor | None = None  # the last result, of all shards, for rules that start from it

    def decide(
        self,
        columns: Tensor,
        absent: Sequence[int],
        previous: Tensor | None,
        exchange: AllToAll | None,
        step: int,
    ) -> MixingPlan | NoResult:
        """Decide how the rows are combined; all ranks call this together.

        Args:
            columns: This rank's shard of all rows, of shape (N, s).
            absent: For each rank, the number of its rows that are no gradients.
            previous: This rank's shard of the last result, for rules that start from it.
            exchange: Connects the ranks; ``None`` on one.
            step: Optimizer steps so far.
        """
        norms, gram = self._measure(columns, previous, exchange, step)
        missing, faulty = _classify_rows(norms, absent)
        f = self.rule.num_byzantine
        self.report = StepReport(step, len(norms), dropped=tuple(faulty), absent=tuple(missing))
        if len(faulty) + len(missing) == len(norms):
            return NoResult(faulty, "no worker has a finite gradient")
        if len(faulty) > f and not self.drops_more:
            return NoResult(faulty, f"workers {faulty} have gradients that are not finite")
        # The rule drops up to f rows that are not finite by itself; the others are dropped here.
        passed = [i for i in range(len(norms)) if i not in {*missing, *faulty[f:]}]
        if missing and not self._is_enough(len(passed)):
            return NoResult(
                faulty, f"workers {missing} have no gradient, and the others are too few"
            )
        kept, left = self.rule.keep(norms[passed])
        plan = self._plan([passed[index] for index in kept], left, gram)
        self._report(passed, missing, plan)
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
        # Squares and products add up over shards, and all ranks get the same bits: so they decide alike without a vote.
        # NaN in any shard makes the sum NaN.
        sums = exchange.all_reduce_sum(torch.cat([norms, gram.flatten()]), Purpose.GRADIENTS, step)
        return sums[: len(norms)], sums[len(norms) :].view(gram.shape)

    def _reference(self, norms: Tensor) -> int | None:
        if not self.rule.centred:
            return None
        # Ranks may choose different rows: each shard loses the same from all rows, which shifts them all alike.
        finite = norms.isfinite().nonzero().flatten()
        return int(finite[median_row(norms[finite])]) if len(finite) else 0

    def _is_enough(self, num_rows: int) -> bool:
        try:
            self.rule.check(num_rows)
        except ValueError:
            return False
        return True

    def _plan(self, kept: Sequence[int], num_byzantine: int, gram: Tensor) -> MixingPlan:
        if not self.rule.needs_gram:
            return MixingPlan(kept, num_byzantine, None)
        chosen = [*kept, len(gram) - 1] if self.rule.uses_previous_output else list(kept)
        matrix = self.rule.mixing(gram[chosen][:, chosen], num_byzantine)
        return MixingPlan(kept, num_byzantine, matrix)

    def _report(self, passed: Sequence[int], missing: Sequence[int], plan: MixingPlan) -> None:
        found, weights, num_rows = self.rule.report, None, self.report.num_workers
        # With one row the matrix is the shares in the result itself; otherwise coordinates decide afterwards.
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

    def carry_out(self, plan: MixingPlan, columns: Tensor, previous: Tensor | None) -> Tensor:
        """Combine one shard as decided.

        Args:
            plan: From :meth:`decide`.
            columns: One shard of all rows, of shape (N, s).
            previous: The same shard of the last result, for rules that start from it.

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
        """Keep the result, of all shards, if the rule starts from it in the next step."""
        if self.rule.uses_previous_output:
            self.previous = result.clone()

    def part_of_previous(self, gradients: FlatGradients, index: int) -> Tensor | None:
        """Return one shard of the last result, at first zeros, for rules that start from it."""
        if not self.rule.uses_previous_output:
            return None
        whole = torch.zeros_like(gradients.rows[0])
        if self.previous is not None:
            known = self.previous[: gradients.numel].to(whole)
            # The padding depends on the number of ranks, which may have changed since a checkpoint.
            whole[: len(known)] = known
        return whole.view(gradients.num_shards, -1)[index]

    def state_dict(self) -> dict[str, Any]:
        """Return what the next step depends on; the same on all ranks."""
        state: dict[str, Any] = {"rule": self.rule.state_dict()}
        return state if self.previous is None else {**state, "previous": self.previous}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self.rule.load_state_dict(state["rule"])
        self.previous = state.get("previous")


def _classify_rows(norms: Tensor, absent: Sequence[int]) -> tuple[list[int], list[int]]:
    """List the rows that are no gradients, and the others that are not finite."""
    missing, faulty = [], []
    rows_per_rank = len(norms) // len(absent)
    for rank, num_absent in enumerate(absent):
        begin = rank * rows_per_rank
        broken = [i for i in range(begin, begin + rows_per_rank) if not norms[i].isfinite()]
        # Absent gradients are sent as NaN, so only rows that are in fact not finite can count as absent.
        missing += broken[:num_absent]
        faulty += broken[num_absent:]
    return missing, faulty


def squared_distances_from(columns: Tensor, point: Tensor) -> Tensor:
    """Return the squared distance of each row, of shape (N, s), from a point: shape (N,), float64, on the CPU."""
    total = torch.zeros(len(columns), dtype=torch.float64)
    for where, block in column_blocks(columns):
        total += (block - point[where]).double().square().sum(dim=1).cpu()
    return total


def refuse_too_few(rule: Aggregator, num_workers: int, unit: str) -> None:
    """Raise if the rule has no guarantee for this number of workers, which are ranks or micro-batches (``unit``)."""
    expect(
        2 * rule.num_byzantine < num_workers,
        "num_byzantine",
        f"less than half of {num_workers} {unit}",
        rule.num_byzantine,
        f"Use at least {2 * rule.num_byzantine + 1} workers, or expect fewer faulty ones.",
    )
    rule.check(num_workers)
