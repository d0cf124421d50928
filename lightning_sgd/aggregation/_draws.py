"""Random numbers that all ranks agree on."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch


class Draws:
    """A fresh generator for every call, from a seed and the number of the call; that number is all its state.

    Args:
        seed: The same on all ranks.
    """

    def __init__(self, seed: int) -> None:
        self.seed, self.num_calls = seed, 0

    def next_generator(self) -> torch.Generator:
        """The generator of the next call."""
        generator = torch.Generator().manual_seed((self.seed << 32) + self.num_calls)
        self.num_calls += 1
        return generator

    def next_uniform(self) -> Callable[[], float]:
        """A function that draws from [0, 1), of the next call."""
        generator = self.next_generator()
        return lambda: float(torch.rand((), generator=generator, dtype=torch.float64))

    def state_dict(self) -> dict[str, int]:
        """Seed and number of calls."""
        return {"seed": self.seed, "num_calls": self.num_calls}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on from a state.

        Args:
            state: What :meth:`state_dict` returned.
        """
        self.seed, self.num_calls = state["seed"], state["num_calls"]
