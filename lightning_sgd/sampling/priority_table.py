"""Scores of all samples, how old they are, and the tree from which samples are drawn."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from lightning_sgd._validation import expect, expect_one_of, is_finite_at_least
from lightning_sgd.functional.sampling.priority_sampling import (
    decayed_scores,
    priority_values,
    rank_values,
    top_fraction,
)
from lightning_sgd.sampling.sum_tree import SumTree, uniform_numbers

if TYPE_CHECKING:
    from numpy.typing import NDArray

Order: TypeAlias = Literal["proportional", "rank", "top"]
Unseen: TypeAlias = Literal["mean", "max"]
UNKNOWN = -math.inf
"""In place of a score: keep the old one."""


class PriorityTable:
    """Turn scores into probabilities: by their size at once, or by their rank once per epoch.

    Args:
        num_samples: Size of the data set [N].
        order: ``proportional`` to (s + ε)^α; by ``rank``, as Loshchilov and Hutter; ``top``: those with the largest
            scores alone.
        uniform_mix: Share of draws that are uniform [λ].
        alpha: Exponent of the scores [α].
        offset: What is added to every score, in units of their mean [ε].
        half_life: Epochs in which a score that is not measured comes half of the way to the mean.
        unseen: What samples without a score get: the mean, or the largest.
        pressure: By ``rank``: how many times likelier the first is than the last [s_e].
        top: By ``top``: their share.
    """

    def __init__(
        self,
        num_samples: int,
        order: Order,
        uniform_mix: float,
        alpha: float,
        offset: float,
        half_life: float | None,
        unseen: Unseen,
        pressure: float,
        top: float,
    ) -> None:
        self.order, self.uniform_mix, self.alpha = order, uniform_mix, alpha
        self.offset, self.half_life, self.unseen = offset, half_life, unseen
        self.pressure, self.top = pressure, top
        check_table_settings(order, uniform_mix, alpha, offset, half_life, unseen, pressure, top)
        self.num_samples = num_samples
        self.tree = SumTree(num_samples)
        self.scores = torch.ones(num_samples)
        self.measured_at = torch.full((num_samples,), -1, dtype=torch.int32)
        self.is_drawn = torch.zeros(num_samples, dtype=torch.bool)
        self.num_updates = 0
        self._ordered = self.scores  # as of the last `rebuild`, where the order is by rank
        self._decayed_at = 0
        self._floor = self._fill = self._smallest = 0.0
        self.rebuild(1)

    def rebuild(self, num_updates_per_epoch: int) -> None:
        """Let old scores decay, and enter them into the tree; once per epoch.

        Args:
            num_updates_per_epoch: The unit of the half-life.
        """
        seen = self.measured_at >= 0
        known = self.scores[seen]
        if len(known):
            if self.half_life is not None:
                since = self.measured_at[seen].clamp(min=self._decayed_at)
                ages = (self.num_updates - since) / num_updates_per_epoch
                known = decayed_scores(known, ages, self.half_life)
                self.scores[seen] = known
            self._decayed_at = self.num_updates
        else:
            known = torch.ones(1)
        mean = float(known.mean(dtype=torch.float64))
        self._fill = mean if self.unseen == "mean" else float(known.max())
        self._floor = self.offset * mean
        self._ordered = self.scores if self.order == "proportional" else self.scores.clone()
        self._enter()

    def draw(self, num: int, generator: torch.Generator, stratified: bool) -> tuple[Tensor, Tensor]:
        """Draw indices, in random order, with their probabilities.

        Args:
            num: Number of draws.
            generator: Source of randomness.
            stratified: Draw one sample from each of equal parts of the probability.
        """
        numbers = uniform_numbers(num, generator, stratified)
        mix, total, last = self._uniform_share, self.tree.total, self.num_samples - 1
        if mix == 1.0:
            indices = (numbers * self.num_samples).astype(np.int64)
        else:
            indices = self.tree.find_array((numbers - mix) * (total / (1 - mix)))
            if mix > 0:
                uniform = (numbers * (self.num_samples / mix)).astype(np.int64)
                indices = np.where(numbers < mix, uniform, indices)
        indices = np.minimum(indices, last)  # rounding may come to one more
        if stratified:
            indices = indices[torch.randperm(num, generator=generator).numpy()]
        if mix == 1.0:
            probabilities = np.full(num, 1 / self.num_samples)
        else:
            values = self.tree.weights.numpy()[indices]
            probabilities = values * ((1 - mix) / total) + mix / self.num_samples
        return torch.from_numpy(indices), torch.from_numpy(probabilities)

    def probabilities(self, indices: Tensor | None = None) -> Tensor:
        """Return the probabilities with which these samples, or all, would be drawn now, float64."""
        values = self.tree.weights if indices is None else self.tree.get(indices)
        mix = self._uniform_share
        if mix == 1.0:
            return torch.full((len(values),), 1 / self.num_samples, dtype=torch.float64)
        return values * ((1 - mix) / self.tree.total) + mix / self.num_samples

    @property
    def smallest_probability(self) -> float:
        """A lower bound of all probabilities, from the smallest value since the last rebuild."""
        mix = self._uniform_share
        if mix == 1.0:
            return 1 / self.num_samples
        return self._smallest * (1 - mix) / self.tree.total + mix / self.num_samples

    @property
    def is_uniform(self) -> bool:
        """True if all samples have the same probability whatever their scores."""
        return self._uniform_share == 1.0 or (self.order == "proportional" and self.alpha == 0.0)

    def update(self, indices: Tensor, scores: Tensor) -> int:
        """Enter scores; of a sample that comes twice the last one counts.

        Args:
            indices: Numbers of the samples.
            scores: Their scores; ``-inf`` keeps the old one; what else is not finite becomes the largest known one.

        Returns:
            The number of scores that were neither finite nor ``-inf``.
        """
        self.num_updates += 1
        at, new, num_bad = indices.numpy(), scores.float().numpy(), 0
        if not np.isfinite(new).all():
            is_known = new != UNKNOWN
            at, new = at[is_known], new[is_known]
            good = np.isfinite(new)
            num_bad = int(len(new) - good.sum())
            new = np.where(good, new, self._largest(new[good]))
        if len(new):
            new = np.maximum(new, np.float32(0))
            self.scores.numpy()[at] = new
            self.measured_at.numpy()[at] = self.num_updates
            if self.order == "proportional":
                values = new.astype(np.float64) + self._floor
                values = values if self.alpha == 1.0 else values**self.alpha
                self._smallest = min(self._smallest, float(values.min()))
                self.tree.set_array(at, values)
        return num_bad

    def ages(self, indices: Tensor) -> Tensor:
        """Return the updates since the scores were measured; all updates where that never happened."""
        return self.num_updates - self.measured_at[indices].clamp(min=0)

    def state_dict(self) -> dict[str, Any]:
        """Return the scores in single precision, as they are measured, and what else determines the tree."""
        state: dict[str, Any] = {
            "scores": self.scores.clone(),
            "measured_at": self.measured_at.clone(),
            "is_drawn": self.is_drawn.clone(),
            "num_updates": self.num_updates,
            "decayed_at": self._decayed_at,
            "floor": self._floor,
            "fill": self._fill,
            "smallest": self._smallest,
        }
        if self.order != "proportional":
            state |= {"ordered": self._ordered.clone(), "pressure": self.pressure}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state, with the same tree to the last bit."""
        expect(
            len(state["scores"]) == self.num_samples,
            "dataset",
            f"the one of the checkpoint, with {len(state['scores'])} samples",
            self.num_samples,
            "Use the same data, or start without `ckpt_path`.",
        )
        self.scores = state["scores"].clone()
        self.measured_at = state["measured_at"].clone()
        self.is_drawn = state["is_drawn"].clone()
        self.num_updates, self._decayed_at = state["num_updates"], state["decayed_at"]
        self._floor, self._fill = state["floor"], state["fill"]
        self._ordered = state.get("ordered", self.scores)
        self.pressure = state.get("pressure", self.pressure)
        self._enter()
        self._smallest = state["smallest"]

    @property
    def _uniform_share(self) -> float:
        return self.uniform_mix if self.tree.total > 0 else 1.0

    def _enter(self) -> None:
        scores = self._ordered.where(self.measured_at >= 0, self._fill)
        if self.order == "proportional":
            values = priority_values(scores, self._floor, self.alpha)
        elif self.order == "rank":
            values = rank_values(scores, self.pressure)
        else:
            values = top_fraction(scores, self.top)
        self._smallest = float(values.min())
        self.tree.rebuild(values)

    def _largest(self, scores: NDArray[np.float32]) -> np.float32:
        known = self.scores.numpy()[self.measured_at.numpy() >= 0]
        return np.concatenate([known, scores]).max(initial=0.0) or np.float32(1.0)


def check_table_settings(
    order: Order,
    uniform_mix: float,
    alpha: float,
    offset: float,
    half_life: float | None,
    unseen: Unseen,
    pressure: float,
    top: float,
) -> None:
    """Refuse settings of :class:`PriorityTable` that are out of range."""
    expect_one_of(order, Order, "order")
    expect_one_of(unseen, Unseen, "unseen")
    remedy = "0.3 is the default; with beta=1 and a large step size take 0.5 or more."
    expect(0 <= uniform_mix <= 1, "uniform_mix", "in [0, 1]", uniform_mix, remedy)
    for name, value in (("alpha", alpha), ("offset", offset)):
        expect(is_finite_at_least(value, 0), name, "a number ≥ 0", value, "Leave it out.")
    expect(
        half_life is None or half_life > 0,
        "half_life",
        "a positive number of epochs",
        half_life,
        "`null` switches the decay off.",
    )
    expect(pressure >= 1, "pressure", "at least 1", pressure, "100 is usual.")
    expect(0 < top <= 1, "top", "in (0, 1]", top, "It is a share of the samples.")
