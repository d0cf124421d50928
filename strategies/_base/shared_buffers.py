"""Buffers that every rank changes by itself, such as the statistics of batch normalisation, as one model needs them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from lightning_sgd.functional.distributed.flat_gradients import layout
from lightning_sgd.functional.robust.robust_statistics import finite_median, most_frequent
from lightning_sgd.strategies._base.replica import copies, put_back
from lightning_sgd.strategies._comm.all_to_all import AllToAll
from lightning_sgd.strategies._comm.collectives import Purpose

BufferRule: TypeAlias = Literal["median", "mean", "rank0", "local"]

RULES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "median": finite_median,
    "mean": lambda rows: rows.mean(dim=0),
    "rank0": lambda rows: rows[0],
}


class SharedBuffers:
    """Puts what the ranks agree on in the place of the buffers: for a while, or for good.

    Args:
        exchange: Between the ranks; ``None`` where there is only one, and nothing happens.
        buffers: Of the module, by name.
        rule: How floating-point buffers are combined; of others the most frequent value is taken.
        step: Tells optimizer steps so far.
    """

    def __init__(
        self,
        exchange: AllToAll | None,
        buffers: Mapping[str, Tensor],
        rule: BufferRule,
        step: Callable[[], int],
    ) -> None:
        self.exchange, self.rule, self.step = exchange, rule, step
        self.buffers = dict(buffers)
        self._own: list[Tensor] | None = None
        self._is_apart = False

    @property
    def is_apart(self) -> bool:
        """Whether ranks may have different buffers, and can be asked for them."""
        return self._is_apart and self.exchange is not None and self._own is None

    def move(self) -> None:
        """Expect buffers to differ from now on: a batch is going to be trained."""
        self._is_apart = bool(self.buffers) and self.rule != "local"

    def enter(self) -> None:
        """Put what all agree on in the place of this rank's own."""
        if self.is_apart:
            own = copies(self._tensors())
            put_back(self._tensors(), self.agreed(own))
            self._own = own

    def leave(self) -> None:
        """Put this rank's own back, if they are not there already."""
        if self._own is not None:
            put_back(self._tensors(), self._own)
            self._own = None

    def settle(self) -> None:
        """Put what all agree on in the place of this rank's own, for good."""
        self.enter()
        self._own, self._is_apart = None, False

    def close(self) -> None:
        """Put this rank's own back, and ask nobody any more."""
        self.leave()
        self._is_apart = False

    @contextmanager
    def shared(self) -> Iterator[None]:
        """With what all agree on in place, whatever was there before."""
        was_in = self._own is not None
        self.enter()
        try:
            yield
        finally:
            if not was_in:
                self.leave()

    def own(self) -> dict[str, Tensor]:
        """This rank's own, by name, whatever is in their place."""
        tensors = self._tensors() if self._own is None else self._own
        return dict(zip(self.buffers, copies(tensors), strict=True))

    def agreed(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """What all ranks agree on.

        Args:
            tensors: This rank's, of the same shapes and types on all.
        """
        agreed = copies(tensors)
        for indices, dtype, rule in self._kinds(agreed):
            self._combine([agreed[index] for index in indices], dtype, rule)
        return agreed

    def _kinds(
        self, tensors: Sequence[Tensor]
    ) -> Iterator[tuple[list[int], torch.dtype, Callable[[Tensor], Tensor]]]:
        floating = [i for i, x in enumerate(tensors) if x.is_floating_point()]
        others = [i for i, x in enumerate(tensors) if not x.dtype.is_complex and i not in floating]
        integers = most_frequent if self.rule != "rank0" else RULES["rank0"]
        yield floating, torch.float64, RULES[self.rule]
        yield others, torch.int64, integers

    def _combine(
        self, tensors: Sequence[Tensor], dtype: torch.dtype, rule: Callable[[Tensor], Tensor]
    ) -> None:
        if not tensors or self.exchange is None:
            return
        mine = torch.cat([tensor.reshape(-1).to(dtype) for tensor in tensors])
        combined = rule(self._of_all_ranks(self.exchange, mine, tensors))
        for tensor, part in zip(
            tensors, torch.split(combined, [x.numel() for x in tensors]), strict=True
        ):
            tensor.copy_(part.view(tensor.shape))

    def _of_all_ranks(self, exchange: AllToAll, mine: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        rows = mine.new_empty(exchange.num_ranks, len(mine))
        exchange.trade(
            dict.fromkeys(range(exchange.num_ranks), mine),
            dict(enumerate(rows)),
            (),
            Purpose.CONSENSUS,
            self.step(),
            layout=layout(("", tensor) for tensor in tensors),
        )
        return rows

    def _tensors(self) -> list[Tensor]:
        return list(self.buffers.values())
