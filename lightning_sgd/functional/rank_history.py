"""What a history of measurements shows: which of them fell, by how much, and since when."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


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
