"""Keep measures of weight matrices over time, and describe which of them fell, by how much, and since when."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

NORM = "frobenius_norm"
HEADLINES = ("effective_rank", "stable_rank")
DEAD = 1e-6
"""A matrix is dead if its norm is this small relative to the first one."""


class Fall(NamedTuple):
    """The fall of one series.

    Attributes:
        first: Value at the beginning.
        last: Value at the end.
        half_time: Time from which on at least half of the fall has happened.
    """

    first: float
    last: float
    half_time: int

    @property
    def share(self) -> float:
        """The fall relative to the first value."""
        return 1.0 - self.last / self.first if self.first else 0.0


def find_fall(times: Sequence[int], values: Tensor) -> Fall:
    """Measure how far a series fell, and from when on it is down by half of that.

    Args:
        times: Optimizer steps of the values, ascending.
        values: Shape (times,).

    Example:
        >>> find_fall([0, 10, 20, 30], torch.tensor([8.0, 7.0, 3.0, 2.0]))
        Fall(first=8.0, last=2.0, half_time=20)
    """
    first, last = float(values[0]), float(values[-1])
    before = ((values - last).abs() > abs(first - last) / 2).nonzero()
    return Fall(first, last, times[int(before[-1]) + 1 if len(before) else 0])


def mean_over_alive(values: Tensor, alive: Tensor) -> Tensor:
    """Average over the layers that are alive; NaN if none is.

    Args:
        values: Shape (…, layers).
        alive: Shape (layers,).

    Example:
        >>> mean_over_alive(torch.tensor([[1.0, 3.0, 90.0]]), torch.tensor([True, True, False]))
        tensor([2.])
    """
    return torch.where(alive, values, 0.0).sum(dim=-1) / alive.sum()


def describe_falls(
    quantity: str, names: Sequence[str], times: Sequence[int], values: Tensor, alive: Tensor
) -> str:
    """Describe the history of one measure of several layers in one line.

    Args:
        quantity: Name of the measure.
        names: Names of the layers.
        times: Optimizer steps of the values.
        values: Shape (times, layers).
        alive: Whether each layer is alive at the end.

    Example:
        >>> values = torch.tensor([[8.0, 6.0], [4.0, 6.0]])
        >>> describe_falls("stable rank", ["a", "b"], [0, 9], values, torch.tensor([True, True]))
        'stable rank of 2 matrices went from 7.0 to 5.0 in 9 steps; most in a, from 8.0 to 4.0, half of it by step 9'
    """
    sentences = []
    if alive.any():
        mean = find_fall(times, mean_over_alive(values, alive))
        sentences.append(
            f"{quantity} of {int(alive.sum())} matrices went from {mean.first:.1f} to {mean.last:.1f} "
            f"in {times[-1] - times[0]} steps"
        )
        falls = {
            name: find_fall(times, series)
            for name, series, lives in zip(names, values.T, alive, strict=True)
            if lives
        }
        name, most = max(falls.items(), key=lambda item: item[1].share)
        if most.share >= 0.01:
            sentences.append(
                f"most in {name}, from {most.first:.1f} to {most.last:.1f}, half of it by step {most.half_time}"
            )
        else:
            sentences.append("none fell by more than 1 %")
    dead = [name for name, lives in zip(names, alive, strict=True) if not lives]
    if dead:
        sentences.append(f"dead: {', '.join(dead)}")
    return "; ".join(sentences)


class Series(NamedTuple):
    """One measure over time.

    Attributes:
        quantity: Name in words.
        times: Optimizer steps of the values.
        values: Shape (times, matrices).
    """

    quantity: str
    times: list[int]
    values: Tensor


@dataclass(slots=True)
class RankHistory:
    """Measures of several matrices over time, at some of the times only the cheap ones.

    Attributes:
        keys: The measures, ``frobenius_norm`` among them.
        cheap: The measures that are always taken.
        times: Optimizer steps of the looks.
        tables: The values, of shape (measures, matrices); NaN for measures that were not taken.
        full: Whether all measures were taken, by time.
    """

    keys: tuple[str, ...]
    cheap: tuple[str, ...]
    times: list[int] = field(default_factory=list)
    tables: list[Tensor] = field(default_factory=list)
    full: list[bool] = field(default_factory=list)

    def add(self, step: int, table: Tensor, full: bool) -> bool:
        """Append a table, and return whether there was one of the same step already.

        A full table then replaces a cheap one, not the other way round.
        """
        again = self.times[-1:] == [step]
        if again and not full:
            return True
        keep = len(self.times) - again
        self.times[keep:], self.tables[keep:], self.full[keep:] = [step], [table], [full]
        return again

    def alive(self, table: Tensor) -> Tensor:
        """Return which matrices are finite and have not shrunk to nothing, which the rank does not show."""
        row = self.keys.index(NORM)
        norm, first = table[row], self.tables[0][row]
        return norm.isfinite() & (norm > DEAD * first)

    def headline(self) -> Series:
        """Return the effective rank over time, or the stable rank where only that was taken more than once.

        Example:
            >>> history = RankHistory(keys=(NORM, "stable_rank", "effective_rank"), cheap=(NORM, "stable_rank"))
            >>> history.add(0, torch.tensor([[1.0], [2.0], [3.0]]), full=True)
            False
            >>> history.headline()
            Series(quantity='effective rank', times=[0], values=tensor([[3.]]))
            >>> history.add(9, torch.tensor([[1.0], [2.0], [torch.nan]]), full=False)
            False
            >>> history.headline().quantity
            'stable rank'
        """
        found = [self._series(key) for key in HEADLINES if key in self.keys]
        found = found or [self._series(self.keys[0])]
        return next((series for series in found if len(series.times) > 1), found[0])

    def _series(self, key: str) -> Series:
        row = self.keys.index(key)
        looks = [look for look, full in enumerate(self.full) if full or key in self.cheap]
        values = torch.stack([self.tables[look][row] for look in looks])
        return Series(key.replace("_", " "), [self.times[look] for look in looks], values)

    def describe(self, names: Sequence[str], end: int) -> str:
        """Describe the headline in one line; ``end`` is the step at which training ended."""
        quantity, times, values = self.headline()
        found = f"{quantity} was measured once"
        if len(times) > 1:
            found = describe_falls(quantity, names, times, values, self.alive(self.tables[-1]))
        if times[-1] < end:
            found += f", as of step {times[-1]} of {end}: `max_overhead` allowed no full look since"
        return found

    def clear(self) -> None:
        """Remove all values."""
        self.load_state_dict({"times": [], "history": [], "full": []})

    def state_dict(self) -> dict[str, Any]:
        """Return everything but the names of the measures."""
        return {"times": list(self.times), "history": list(self.tables), "full": list(self.full)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self.times, self.tables = list(state_dict["times"]), list(state_dict["history"])
        self.full = list(state_dict["full"])
