"""Rules that look at more samples than are trained on, and choose among them with the weights as they are."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from lightning_sgd._validation import expect, expect_one_of, is_finite_at_least, plain_number
from lightning_sgd.functional.sampling.batch_selection import (
    draw_rows,
    keep_by_percentile,
    keep_by_quantile,
    keep_largest,
)
from lightning_sgd.functional.sampling.priority_sampling import batch_size_gain, presample_threshold

SelectionRule: TypeAlias = Literal["quantile", "percentile", "top"]


class Selection(ABC):
    """Choose rows of a batch by their scores; all ranks at the same time, each among its own."""

    draws_uniformly: bool
    """True if batches are drawn independently of each other, not as permutations."""

    @abstractmethod
    def prepare(self, batch_size: int) -> None:
        """Begin a training.

        Args:
            batch_size: Samples per rank in the data loader.
        """

    @property
    @abstractmethod
    def num_candidates(self) -> int:
        """The number of samples per rank of the next batches."""

    @abstractmethod
    def is_due(self, progress: float, step: int, num_rows: int) -> bool:
        """Decide if rows of this batch are chosen.

        Args:
            progress: Share of the training that is done.
            step: Batches so far.
            num_rows: Rows of the batch.
        """

    @abstractmethod
    def choose(self, scores: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the numbers of the rows to train on, and the weights of their losses, if they have any.

        Args:
            scores: Of all rows of this rank.
            numbers: As many, uniform in [0, 1), the next numbers of the training.
        """

    @abstractmethod
    def observe(self, scores: Tensor) -> None:
        """Learn from the scores of the rows of all ranks.

        Args:
            scores: The known ones.
        """

    @abstractmethod
    def describe(self) -> str:
        """Describe what is chosen and when, as a part of a sentence."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Return what was learnt: tensors, numbers, strings, lists, dictionaries."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what was learnt.

        Args:
            state: From :meth:`state_dict`.
        """


class Presampling(Selection):
    r"""Draw several times as many candidates, and train on a batch of them by importance, while that pays.

    Katharopoulos and Fleuret's rule: B = ``factor`` · b uniform candidates, scores s by a forward pass without
    gradients, :math:`\gamma = s/\sum s`, b of the candidates drawn with replacement by γ, weights
    :math:`1/(B\gamma)`; unbiased. The gain :math:`\tau = \sqrt{n \sum \gamma^2}`, averaged over time, switches it on
    above ``threshold`` and off below; while it is off it is measured on what is trained.

    Cost while it is on: one forward pass of ``factor`` batches per step.

    Args:
        factor: Candidates per trained sample [B / b].
        threshold: Gain from which looking pays [τ_th]; by default (B + 3b) / (3b), where backward costs two forward.
        decay: Of the average of the gain [a].

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> rule = Presampling()
        >>> rule.prepare(batch_size=32)
        >>> rule.num_candidates, rule.threshold_for(32)
        (32, 2.0)

    Reference:
        Angelos Katharopoulos, François Fleuret. Not All Samples Are Created Equal: Deep Learning with Importance
        Sampling. ICML 2018.
    """

    draws_uniformly = True

    def __init__(
        self, factor: float = 3.0, threshold: float | None = None, decay: float = 0.9
    ) -> None:
        factor, threshold, decay = plain_number([factor, threshold, decay])
        expect(is_finite_at_least(factor, 1), "factor", "at least 1", factor, "3 is usual.")
        expect(threshold is None or threshold >= 0, "threshold", "≥ 0", threshold, "Leave it out.")
        expect(0 <= decay < 1, "decay", "in [0, 1)", decay, "The default is 0.9.")
        self.factor, self.threshold, self.decay = factor, threshold, decay
        self.batch_size = 1
        self.gain = 0.0
        self.num_on = self.num_steps = 0

    def prepare(self, batch_size: int) -> None:
        """Start with the rule switched off."""
        self.batch_size, self.gain = batch_size, 0.0
        self.num_on = self.num_steps = 0

    def threshold_for(self, batch_size: int) -> float:
        """Return the gain above which the rule is on."""
        if self.threshold is not None:
            return self.threshold
        return presample_threshold(self._num(batch_size), batch_size)

    @property
    def is_on(self) -> bool:
        """True if the gain is above the threshold."""
        return self.gain > self.threshold_for(self.batch_size)

    @property
    def num_candidates(self) -> int:
        """The number B of candidates while the rule is on, else the batch size b."""
        return self._num(self.batch_size) if self.is_on else self.batch_size

    def is_due(self, progress: float, step: int, num_rows: int) -> bool:
        """Choose while the rule is on, from batches that were drawn for it: workers may have prefetched others."""
        return self.is_on and num_rows > self.batch_size

    def choose(self, scores: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor | None]:
        """Draw rows in proportion to their scores."""
        self.num_on += 1
        rows, weights = draw_rows(scores.clamp(min=0), numbers[: self.batch_size])
        return rows, weights.float()

    def observe(self, scores: Tensor) -> None:
        """Update the average of the gain."""
        self.num_steps += 1
        if len(scores):
            self.gain = self.decay * self.gain + (1 - self.decay) * batch_size_gain(
                scores.clamp(min=0)
            )

    def describe(self) -> str:
        """Name the number of candidates and the threshold."""
        return (
            f"{self._num(self.batch_size)} candidates per rank for batches of {self.batch_size} while their gain is "
            f"above {self.threshold_for(self.batch_size):.3g}"
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the gain, and how often the rule was on."""
        return {"gain": self.gain, "num_on": self.num_on, "num_steps": self.num_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the gain."""
        self.gain, self.num_on, self.num_steps = state["gain"], state["num_on"], state["num_steps"]

    def _num(self, batch_size: int) -> int:
        return round(self.factor * batch_size)


class InBatchSelection(Selection):
    """Train on the harder part of each batch, which saves backward passes and is biased.

    ``quantile``, Composer's variant, draws ⌊keep · n⌋ rows without replacement with weights q^(1/keep − 1) of the
    quantile q of the score in the batch; ``percentile``, Selective-Backprop, keeps each row with probability
    max(floor, c^(1/keep − 1)) for the percentile c of its score among the last ``num_history`` ones, ``keep`` of them
    on average; ``top`` takes the ⌊keep · n⌋ largest, as RHO-LOSS does with scores ``rho``.

    Cost: a forward pass of the whole batch, in evaluation mode, when it is active.

    Args:
        keep: Share of the rows that is trained on.
        rule: How they are chosen.
        start: Share of the training at which it begins.
        end: Share of the training at which it ends.
        interrupt: Every how many batches one is left whole; 0 for none.
        floor: ``percentile``: smallest probability [p_min].
        num_history: ``percentile``: how many scores are remembered.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> rule = InBatchSelection(keep=0.5, rule="top")
        >>> rows, weights = rule.choose(torch.tensor([1.0, 4.0, 2.0, 3.0]), torch.rand(4))
        >>> rows.tolist(), weights
        ([1, 3], None)

    Reference:
        Angela H. Jiang et al. Accelerating Deep Learning by Focusing on the Biggest Losers. arXiv:1910.00762.
        Sören Mindermann et al. Prioritized Training on Points that are Learnable, Worth Learning, and Not Yet Learnt.
        ICML 2022.
    """

    draws_uniformly = False

    def __init__(
        self,
        keep: float = 0.5,
        rule: SelectionRule = "quantile",
        start: float = 0.5,
        end: float = 0.9,
        interrupt: int = 2,
        floor: float = 0.0,
        num_history: int = 1024,
    ) -> None:
        keep, start, end, floor = plain_number([keep, start, end, floor])
        interrupt, num_history = plain_number([interrupt, num_history])
        expect(0 < keep <= 1, "keep", "in (0, 1]", keep, "It is a share of the batch.")
        expect_one_of(rule, SelectionRule, "rule")
        expect(
            0 <= start <= end <= 1, "start, end", "0 ≤ start ≤ end ≤ 1", (start, end), "Try 0, 1."
        )
        expect(interrupt >= 0, "interrupt", "at least 0", interrupt, "0 is for none.")
        expect(0 <= floor <= 1, "floor", "in [0, 1]", floor, "It is a probability.")
        expect(num_history >= 1, "num_history", "at least 1", num_history, "1024 is usual.")
        self.keep, self.rule, self.start, self.end = keep, rule, start, end
        self.interrupt, self.floor, self.num_history = interrupt, floor, num_history
        self.batch_size = 1
        self.history = torch.zeros(0)

    def prepare(self, batch_size: int) -> None:
        """Start without history."""
        self.batch_size, self.history = batch_size, torch.zeros(0)

    @property
    def num_candidates(self) -> int:
        """The batch size."""
        return self.batch_size

    def is_due(self, progress: float, step: int, num_rows: int) -> bool:
        """Choose between start and end, except in every ``interrupt``-th batch."""
        is_whole = self.interrupt > 0 and (step + 1) % self.interrupt == 0
        is_on = self.start <= progress and (progress < self.end or self.end == 1.0)
        return is_on and not is_whole

    def choose(self, scores: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor | None]:
        """Choose by the rule."""
        if self.rule == "top":
            return keep_largest(scores, self.keep), None
        if self.rule == "quantile":
            return keep_by_quantile(scores, self.keep, numbers), None
        history = torch.cat([self.history, scores])[-self.num_history :]
        return keep_by_percentile(scores, history, 1 / self.keep - 1, self.floor, numbers), None

    def observe(self, scores: Tensor) -> None:
        """Add the scores to the history."""
        if self.rule == "percentile":
            self.history = torch.cat([self.history, scores])[-self.num_history :]

    def describe(self) -> str:
        """Name the share, the rule and the time."""
        but = f", but for every {self.interrupt}. batch" if self.interrupt else ""
        when = f"from {self.start:.0%} to {self.end:.0%} of the training{but}"
        return f"{self.keep:.0%} of each batch by {self.rule}, {when}"

    def state_dict(self) -> dict[str, Any]:
        """Return the history."""
        return {"history": self.history.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the history."""
        self.history = state["history"].clone()
