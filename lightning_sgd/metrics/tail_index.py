"""The tail index of a stream of samples, over batches and ranks, as a torchmetrics ``Metric``."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from lightning_sgd._validation import expect, expect_one_of
from lightning_sgd.functional.noise.dyadic_ladder import LadderSums, coordinate_sums, pooled_sums
from lightning_sgd.functional.noise.tail_index import TailIndexResult, tail_index_of
from lightning_sgd.metrics._scalar_metric import ScalarMetric

TailIndexMode: TypeAlias = Literal["pooled", "coordinate"]


class TailIndex(ScalarMetric):
    r"""Tail index of everything since the last reset: 2 for Gaussian samples, less for heavier tails.

    The index is :func:`~lightning_sgd.dyadic_tail_index` of all updates as one sequence; it does not depend on how the
    sequence is divided into updates. The state is a few hundred numbers, and the samples that do not fill a block yet.
    Each rank has a sequence of its own; their sums are added.

    Args:
        mode: ``"pooled"`` takes all values for one sequence, right only if they are independent and of one scale.
            ``"coordinate"`` takes updates of shape (samples, coordinates), every column for a sequence, and the mean of
            1/α over columns.
        levels: Number of doublings [J]; a block has 2^J samples. By default 8 pooled, 2 by coordinate.
        **kwargs: Settings of every ``torchmetrics.Metric``.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> metric = TailIndex()
        >>> for seed in range(10):
        ...     metric.update(torch.randn(20_000, generator=torch.Generator().manual_seed(seed)))
        >>> round(metric.compute().item(), 1)
        2.0
        >>> metric.result().verdict
        'finite variance'

    Reference:
        Şimşekli et al., https://arxiv.org/abs/1901.06053
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False
    plot_lower_bound = 0.0

    rest: Tensor | list[Tensor]  # one tensor once ranks are combined

    def __init__(
        self,
        mode: TailIndexMode = "pooled",
        levels: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        expect_one_of(mode, TailIndexMode, "mode")
        self.mode = mode
        # A fixed number, unlike in the function: the length of the sequence is not known in advance.
        self.levels = {"pooled": 8, "coordinate": 2}[mode] if levels is None else levels
        remedy = "A block has 2^levels samples."
        expect(1 <= self.levels <= 30, "levels", "between 1 and 30", levels, remedy)
        for name, value in vars(LadderSums.empty(self.levels)).items():
            self.add_state(name, value, dist_reduce_fx="sum")
        self.add_state("rest", [], dist_reduce_fx="cat")

    def update(self, samples: Tensor) -> None:
        """Add samples at the end of the sequence.

        Args:
            samples: Any shape, or (samples, coordinates) by coordinate; always equally many coordinates.
        """
        sums, rest = self._ladder(self._after_rest(samples))
        self._set(self._sums() + sums)
        self.rest = [rest.clone()] if len(rest) else []  # a view would keep all samples

    def result(self) -> TailIndexResult:
        """Return index, standard error, profile and verdict for the samples that this rank has seen."""
        if not len(self.rest):
            return tail_index_of(self._sums())
        # After ranks were combined, their remaining samples together may fill blocks.
        rest = self.rest if isinstance(self.rest, Tensor) else torch.cat(self.rest)
        return tail_index_of(self._sums() + self._ladder(rest)[0])

    def compute(self) -> Tensor:
        """Compute the index; NaN before the first block is complete."""
        return torch.tensor(self.result().alpha, device=self.device)

    def _after_rest(self, samples: Tensor) -> Tensor:
        samples = samples.detach()
        if self.mode == "pooled":
            samples = samples.flatten()
        else:
            remedy = "Give each gradient a row."
            shape = tuple(samples.shape)
            expect(samples.ndim == 2, "samples", "of shape (samples, coordinates)", shape, remedy)
        # In front of the new samples, so that it does not matter how a sequence is cut into updates.
        return torch.cat([*(rest.to(samples) for rest in self.rest), samples])

    def _ladder(self, samples: Tensor) -> tuple[LadderSums, Tensor]:
        ladder = pooled_sums if self.mode == "pooled" else coordinate_sums
        return ladder(samples, self.levels)

    def _sums(self) -> LadderSums:
        return LadderSums(*(getattr(self, name) for name in LadderSums.__dataclass_fields__))

    def _set(self, sums: LadderSums) -> None:
        for name, value in vars(sums).items():
            setattr(self, name, value)
