"""What an attack is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from lightning_sgd._validation import expect

Scope: TypeAlias = Literal["own", "columns", "rows"]


class Attack(ABC):
    """A function from the rows of honest workers to those of faulty ones.

    Attributes:
        scope: ``"own"``: it needs only what a faulty worker would have sent; ``"columns"``: it needs the honest rows
            too, but any block of columns by itself; ``"rows"``: it needs whole rows.
    """

    scope: Scope

    @abstractmethod
    def __call__(self, honest: Tensor, own: Tensor, generator: torch.Generator) -> Tensor:
        """The rows that the faulty workers send.

        Args:
            honest: Rows of the honest workers, of shape (n − f, s); not looked at where the scope is ``"own"``.
            own: What the faulty workers would have sent, of shape (f, s).
            generator: Source of randomness.

        Returns:
            Tensor of the shape, type and device of ``own``.
        """

    def state_dict(self) -> dict[str, object]:
        """What the next call depends on."""
        return {}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Go on from a state.

        Args:
            state: What :meth:`state_dict` returned.
        """
        expect(not state, "state", "empty", dict(state), "It belongs to another attack.")
