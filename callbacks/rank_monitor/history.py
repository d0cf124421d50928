"""What a history of measurements shows: which of them fell, by how much, and since when."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

NORM = "frobenius_norm"
HEADLINES = ("effective_rank", "stable_rank")
DEAD = 1e-6


class Fall(NamedTuple):
    """How one series went down.

    Attributes:
        first: Value at the beginning.
        last: Value at the end.
        half_time: Time since which at least half of the fall had happened.
    """

    first: float
    last: float
    half_time: int

    @property
    def share(self) -> float:
        """How much of the first value is gone."""
        return 1.0 - self.last / self.first if self.first else 0.0


def find_fall(times: Sequence[int], values: Tensor) -> Fall:
    """How far a series fell, and since when it is down by half of that.

    Args:
        times: When the values were taken, in ascending order.
        values: One value for each time, shape (t,).

    Example:
        >>> find_fall([0, 10, 20, 30], torch.tensor([8.0, 7.0, 3.0, 2.0]))
        Fall(first=8.0, last=2.0, half_time=20)
    """
    first, last = float(values[0]), float(values[-1])
    before = ((values - last).abs() > abs(first - last) / 2).nonzero()
    return Fall(first, last, times[int(before[-1]) + 1 if len(before) else 0])


def mean_of_the_living(values: Tensor, alive: Tensor) -> Tensor:
    """Mean over layers without the dead ones; NaN if none is left.

    Args:
        values: Shape (…, layers).
        alive: Which layers count, shape (layers,).

    Example:
        >>> mean_of_the_living(torch.tensor([[1.0, 3.0, 90.0]]), torch.tensor([True, True, False]))
        tensor([2.])
    """
    return torch.where(alive, values, 0.0).sum(dim=-1) / alive.sum()


def describe_falls(
    quantity: str, names: Sequence[str], times: Sequence[int], values: Tensor, alive: Tensor
) -> str:
    """One line about the history of one measure of several layers.

    Args:
        quantity: Name of the measure.
        names: Names of the layers.
        times: Steps at which the values were taken.
        values: Shape (times, layers).
        alive: Which layers are alive at the end.

    Example:
        >>> values = torch.tensor([[8.0, 6.0], [4.0, 6.0]])
        >>> describe_falls("stable rank", ["a", "b"], [0, 9], values, torch.tensor([True, True]))
        'stable rank of 2 matrices went from 7.0 to 5.0 in 9 steps; most in a, from 8.0 to 4.0, half of it by step 9'
    """
    sentences = []
    if alive.any():
        mean = find_fall(times, mean_of_the_living(values, alive))
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
        quantity: Its name in words.
        times: Steps at which it was taken.
        values: Shape (times, matrices).
    """

    quantity: str
    times: list[int]
    values: Tensor


@dataclass(slots=True)
class RankHistory:
    """Measures of several matrices over time, at some of the times only those that are cheap.

    Attributes:
        keys: The measures, ``frobenius_norm`` among them.
        cheap: Those that are always taken.
        times: Steps at which they were taken.
        tables: The values, of shape (measures, matrices); NaN for measures that were not taken.
        full: Whether all of them were taken.
    """

    keys: tuple[str, ...]
    cheap: tuple[str, ...]
    times: list[int] = field(default_factory=list)
    tables: list[Tensor] = field(default_factory=list)
    full: list[bool] = field(default_factory=list)

    def add(self, step: int, table: Tensor, full: bool) -> bool:
        """Enter values, and say whether the matrices were looked at before at the same step.

        Then all measures take the place of the cheap ones, not the other way round.

        Args:
            step: When they were taken.
            table: As in ``tables``.
            full: Whether all measures were taken.
        """
        again = self.times[-1:] == [step]
        if again and not full:
            return True
        keep = len(self.times) - again
        self.times[keep:], self.tables[keep:], self.full[keep:] = [step], [table], [full]
        return again

    def alive(self, table: Tensor) -> Tensor:
        """Which matrices are finite and have not shrunk to nothing; what shrinks keeps its shape, hence its rank.

        Args:
            table: As in ``tables``.
        """
        row = self.keys.index(NORM)
        norm, first = table[row], self.tables[0][row]
        return norm.isfinite() & (norm > DEAD * first)

    def headline(self) -> Series:
        """The measure that stands for all: the effective rank, or the stable rank where only that was taken again.

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
        """One line about the headline.

        Args:
            names: Names of the matrices.
            end: The step at which training ended.
        """
        quantity, times, values = self.headline()
        found = f"{quantity} was measured once"
        if len(times) > 1:
            found = describe_falls(quantity, names, times, values, self.alive(self.tables[-1]))
        if times[-1] < end:
            found += (
                f", as of step {times[-1]} of {end}: `max_overhead` allowed no closer look since"
            )
        return found

    def clear(self) -> None:
        """Begin again."""
        self.load_state_dict({"times": [], "history": [], "full": []})

    def state_dict(self) -> dict[str, Any]:
        """Everything but the names of the measures."""
        return {"times": list(self.times), "history": list(self.tables), "full": list(self.full)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on as :meth:`state_dict` says."""
        self.times, self.tables = list(state_dict["times"]), list(state_dict["history"])
        self.full = list(state_dict["full"])
