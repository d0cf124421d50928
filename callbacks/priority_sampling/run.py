"""One training with priorities: draws, weights and scores of its batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_sgd._distributed import gather
from lightning_sgd.callbacks.priority_sampling.borrowed import (
    fresh,
    side_effect_free_eval,
    take_rows,
)
from lightning_sgd.callbacks.priority_sampling.loss_listener import LossListener
from lightning_sgd.callbacks.priority_sampling.report import PriorityHistory, hardest
from lightning_sgd.functional.sampling.priority_sampling import (
    WeightNorm,
    batch_size_gain,
    effective_sample_size,
    priority_values,
)
from lightning_sgd.functional.sampling.sample_losses import NAMES
from lightning_sgd.sampling import PrioritySampler
from lightning_sgd.sampling.batch_rows import BatchRows
from lightning_sgd.sampling.draw import Draw
from lightning_sgd.sampling.loss_recorder import (
    LossRecorder,
    NeedsGraph,
    ScoreFunction,
    ScoreName,
)
from lightning_sgd.sampling.priority_table import UNKNOWN
from lightning_sgd.sampling.selection import Selection


class PriorityRun:
    """Connects the training step of the user with the sampler.

    Args:
        sampler: Draws the batches.
        module: What is trained.
        score: What is measured.
        selection: Chooses among the rows of a batch, if anything does.
        irreducible: For ``rho``: what is subtracted from the loss of each sample.
        seed: Of the choices.
    """

    def __init__(
        self,
        sampler: PrioritySampler,
        module: LightningModule,
        score: ScoreName | ScoreFunction,
        selection: Selection | None,
        irreducible: Tensor | None,
        seed: int,
    ) -> None:
        self.sampler, self.module, self.score = sampler, module, score
        self.selection, self.irreducible = selection, irreducible
        if selection is not None:
            selection.prepare(sampler.batch_size)
        self.listener = LossListener(module)
        self.history = PriorityHistory()
        self.classes = torch.full((sampler.num_in_dataset,), -1, dtype=torch.int32)
        self.num_batches = self.num_by_priority = self.num_rows = self.num_trained = 0
        self._generator = torch.Generator().manual_seed(seed)
        self._draw: Draw | None = None
        self._rows = BatchRows(0)
        self._weights: Tensor | None = None
        self._scores: Tensor | None = None
        self._numbers = torch.zeros(0)
        self._selects = False
        self._needs_graph = score == "grad_norm"

    # A batch.

    def begin_batch(
        self, beta: float, norm: WeightNorm, progress: float, rows: BatchRows | None = None
    ) -> None:
        """Take the draw of the next batch, and compute its weights.

        Args:
            beta: 1 for an unbiased gradient, 0 for no correction.
            norm: What to divide the weights by.
            progress: Share of the training that is done.
            rows: The samples of the rows; by default one row each, in order.
        """
        draw, sampler = self.sampler.take(), self.sampler
        self._draw, self._scores = draw, None
        num_drawn = len(draw.indices) // sampler.num_replicas
        # `__getitems__` of a data set may make the batch itself, in order by contract; then the number is not known.
        is_counted = rows is not None and rows.num_items == num_drawn
        self._rows = rows if rows is not None and is_counted else BatchRows(num_drawn)
        self._weights = draw.weights(sampler.num_in_dataset, beta, norm)
        if self.selection is not None:
            # Not the number of rows, which a `collate_fn` may change on one rank alone.
            self._selects = self.selection.is_due(progress, self.num_batches, num_drawn)
            # Drawn for all ranks on all ranks, which keeps their generators alike.
            self._numbers = torch.rand(len(draw.indices), generator=self._generator)

    def training_step(self, original: Callable[..., Any], batch: Any, *others: Any) -> Any:
        """Run the training step of the strategy, weight the losses of the samples and keep their scores."""
        assert self._draw is not None

        def step(rows_of_batch: Any) -> Any:
            return original(rows_of_batch, *others)

        def trial(whole_batch: Any) -> Any:  # not by the strategy, which may count or exchange
            return self.module.training_step(whole_batch, *others)

        num_rows = len(self._rows)
        if self.selection is not None:
            return self._selected_step(step, trial, batch, num_rows)
        recorder, output = self._listen(step, batch, num_rows, self._own_weights())
        self._scores = self._found(recorder, output)
        return output

    def leave_out(self) -> None:
        """Note that the batch has no rows, and so no training step."""
        num_drawn = self._rows.num_items
        self._scores = torch.full((num_drawn,), UNKNOWN, device=self.module.device)
        self._rows = BatchRows(num_drawn)

    def end_batch(self, wants_values: bool) -> dict[str, float]:
        """Exchange the scores of all ranks, and enter them.

        Args:
            wants_values: Whether anybody is going to log what is returned.
        """
        draw, sampler = self._draw, self.sampler
        if draw is None or self._scores is None:
            raise RuntimeError(
                "Expected the strategy to call `training_step`, got another way of training. Leave "
                "PrioritySampling out."
            )
        # One for each sample that was drawn, so that all ranks send as many, whatever rows a `collate_fn` dropped.
        own_scores = self._rows.of_samples(self._scores, UNKNOWN)
        gathered = gather(own_scores, sampler.num_replicas).flatten().cpu()
        scores = self._reduced(gathered, draw.indices)
        values = self._values(draw, scores) if wants_values else {}
        sampler.update(draw, scores)
        if self.selection is not None:
            self.selection.observe(finite(scores[scores != UNKNOWN]))
            sampler.num_candidates = self.selection.num_candidates
        self._draw = None
        self.num_batches += 1
        self.num_by_priority += not draw.is_uniform
        return values

    def measured(self, step: Callable[[Any], Any], batch: Any, num_rows: int) -> Tensor:
        """Measure the scores of the rows of a batch without training; in ``side_effect_free_eval``."""

        def listen(needs_graph: bool) -> tuple[LossRecorder, Any]:
            with torch.set_grad_enabled(needs_graph):
                return self._listen(step, batch, num_rows, None, is_trial=True)

        try:
            recorder, output = listen(self._needs_graph)
        except NeedsGraph:
            self._needs_graph = True
            recorder, output = listen(True)
        if recorder.num_losses > 1 and not self._needs_graph:
            recorder, output = listen(True)  # only the graph shows which of them are returned
        return self._found(recorder, output)

    def resize(self, batch_size: int, drop_last: bool) -> None:
        """Draw batches of another size from the next epoch on, as a data loader that was reloaded says."""
        sampler = self.sampler
        sampler.batch_size, sampler.drop_last = batch_size, drop_last
        sampler.num_candidates = batch_size
        if self.selection is not None:
            learned = self.selection.state_dict()
            self.selection.prepare(batch_size)
            self.selection.load_state_dict(learned)
            sampler.num_candidates = self.selection.num_candidates

    def refresh(self, scores: Tensor) -> None:
        """Enter new scores of all samples.

        Args:
            scores: As they were measured.
        """
        everything = torch.arange(len(scores))
        self.sampler.table.update(everything, self._reduced(scores, everything))

    def spread(self) -> Tensor:
        """Probabilities of all samples; where they are uniform by design, what scores would make of them."""
        if self.selection is None:
            return self.sampler.probabilities()
        table = self.sampler.table
        values = priority_values(table.scores, 1e-3 * float(table.scores.mean()), 1.0)
        return values / values.sum()

    def conclusion(self) -> str:
        """Name the share of draws by priority, the effective sample size, and what is hardest."""
        table, spread = self.sampler.table, self.spread()
        share = effective_sample_size(spread) / len(spread)
        never = 1 - float(table.is_drawn.float().mean())
        if self.selection is None:
            none = ", so it had no effect" if self.num_by_priority == 0 else ""
            drawn = f"{self.num_by_priority} of {self.num_batches} batches drawn by priority{none}"
        else:
            rows = f"{self.num_trained} of {self.num_rows} rows"
            drawn = f"{rows} trained on in {self.num_batches} batches"
        named = hardest(table.scores, table.measured_at, self.classes)
        return f"{drawn}; effective sample size {share:.0%} of {len(spread)}, {never:.1%} never drawn; {named}."

    def state_dict(self) -> dict[str, Any]:
        """Return scores, prefetched draws, generators and history."""
        return {
            "sampler": self.sampler.state_dict(),
            "selection": None if self.selection is None else self.selection.state_dict(),
            "generator": self._generator.get_state(),
            "counts": [self.num_batches, self.num_by_priority, self.num_rows, self.num_trained],
            "history": self.history.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state."""
        self.sampler.load_state_dict(state["sampler"])
        if self.selection is not None:
            self.selection.load_state_dict(state["selection"])
            self.sampler.num_candidates = self.selection.num_candidates
        self._generator.set_state(state["generator"])
        self.num_batches, self.num_by_priority, self.num_rows, self.num_trained = state["counts"]
        self.history.load_state_dict(state["history"])

    # Within a training step.

    def _selected_step(
        self,
        step: Callable[[Any], Any],
        trial: Callable[[Any], Any],
        batch: Any,
        num_rows: int,
    ) -> Any:
        """Measure the scores of all rows, and train on some."""
        assert self.selection is not None
        assert self._draw is not None
        part, num, weights, looked_at = batch, num_rows, self._own_weights(), None
        if self._selects:
            precision = self.module.trainer.precision_plugin
            with side_effect_free_eval(self.module), precision.train_step_context():
                looked_at = self.measured(trial, batch, num_rows)
            scores = finite(self._reduced(looked_at.cpu(), self._of_rows(self._draw.indices)))
            rows, weights = self.selection.choose(scores, self._of_rows(self._numbers))
            part, num = take_rows(batch, rows, num_rows), len(rows)
        elif num_rows > self.sampler.batch_size:  # candidates, but it was switched off meanwhile
            num = self.sampler.batch_size
            part, weights = take_rows(batch, torch.arange(num), num_rows), None
        recorder, output = self._listen(step, part, num, weights)
        found = self._found(recorder, output)
        if looked_at is None:
            looked_at = torch.full((num_rows,), UNKNOWN, device=found.device)
            looked_at[:num] = found
        self._scores = looked_at
        self.num_rows += num_rows
        self.num_trained += num
        return output

    def _listen(
        self,
        step: Callable[[Any], Any],
        batch: Any,
        num_rows: int,
        weights: Tensor | None,
        is_trial: bool = False,
    ) -> tuple[LossRecorder, Any]:
        exact = self.score == "grad_norm"
        params = [p for p in self.module.parameters() if p.requires_grad] if exact else []
        logged = self.listener.logged or frozenset()
        recorder = LossRecorder(num_rows, self.score, weights, batch, params, logged)
        # A step that runs once more may have taken its batch apart.
        return recorder, self.listener.run(
            step, fresh(batch) if is_trial else batch, recorder, is_trial
        )

    def _found(self, recorder: LossRecorder, output: Any) -> Tensor:
        if recorder.scores is not None:
            self._note_classes(recorder)
            return recorder.scores
        # A module skips a step by None, for which ByzantineStrategy puts a constant without a graph.
        is_constant = isinstance(output, Tensor) and output.grad_fn is None
        skips = output is None or (is_constant and torch.is_grad_enabled())
        if skips or recorder.was_missed:
            return torch.full((recorder.num_samples,), UNKNOWN, device=self.module.device)
        rows = ", ".join(map(str, sorted(recorder.other_rows)))
        got = f"{rows} rows" if rows else "none of them"
        got += " that it returns" if recorder.unreached else ""
        if rows and self._draw is not None and not self._rows.is_known:
            raise RuntimeError(
                f"Expected `collate_fn` to make one row for each of the {recorder.num_samples} samples where it cannot "
                f"be followed, got {got}. Leave samples out by torch.utils.data.Subset instead."
            )
        raise RuntimeError(
            f"Expected `training_step` to compute its loss by one of {NAMES} with one row for each of the "
            f"{recorder.num_samples} samples, got {got}. Return lightning_sgd.priority_mean(losses), with one loss for "
            "each sample, in place of losses.mean()."
        )

    def _note_classes(self, recorder: LossRecorder) -> None:
        if self._draw is None or recorder.classes is None:
            return
        own = self._of_rows(self._draw.indices)
        if len(own) == recorder.num_samples:
            self.classes[own] = recorder.classes.to("cpu", torch.int32)

    # Small things.

    def _of_rows(self, values: Tensor) -> Tensor:
        """Select the values of the rows of this rank's batch from those of the samples of all ranks."""
        assert self._draw is not None
        own = self._draw.part(values, self.sampler.rank, self.sampler.num_replicas)
        return self._rows.of_rows(own)

    def _own_weights(self) -> Tensor | None:
        return None if self._weights is None else self._of_rows(self._weights)

    def _reduced(self, scores: Tensor, indices: Tensor) -> Tensor:
        return scores if self.irreducible is None else scores - self.irreducible[indices]

    def _values(self, draw: Draw, scores: Tensor) -> dict[str, float]:
        weights = torch.ones(1) if self._weights is None else self._weights
        known = finite(scores[scores != UNKNOWN]).clamp(min=0)
        table = self.sampler.table
        return {
            "priority/effective_batch_share": effective_sample_size(weights) / len(weights),
            "priority/max_weight": float(weights.max()),
            "priority/gain": batch_size_gain(known) if len(known) else 1.0,
            "priority/lag": float(table.num_updates - draw.step),
            "priority/mean_age": float(table.ages(draw.indices).double().mean()),
        }


def finite(scores: Tensor) -> Tensor:
    """With the largest finite score in place of what is not finite; 1 where none is.

    Args:
        scores: Of any shape.
    """
    good = torch.isfinite(scores)
    if bool(good.all()):
        return scores
    largest = scores[good].max() if bool(good.any()) else torch.ones((), device=scores.device)
    return scores.where(good, largest)
