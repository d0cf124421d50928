"""Random numbers that are equal on all ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch


class Draws:
    """A new generator for every call, seeded by a seed and the number of the call, which is all that resuming needs.

    Args:
        seed: The same on all ranks.
    """

    def __init__(self, seed: int) -> None:
        self.seed, self.num_calls = seed, 0

    def next_generator(self) -> torch.Generator:
        """Return the generator of the next call."""
        # The shift keeps streams of neighbouring seeds apart.
        generator = torch.Generator().manual_seed((self.seed << 32) + self.num_calls)
        self.num_calls += 1
        return generator

    def next_uniform(self) -> Callable[[], float]:
        """Return a function that draws from [0, 1) with the generator of the next call."""
        generator = self.next_generator()
        return lambda: float(torch.rand((), generator=generator, dtype=torch.float64))

    def state_dict(self) -> dict[str, int]:
        """Return the seed and the number of calls."""
        return {"seed": self.seed, "num_calls": self.num_calls}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.seed, self.num_calls = state["seed"], state["num_calls"]
