"""The base class of attacks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from lightning_sgd._validation import expect

Scope: TypeAlias = Literal["own", "columns", "rows"]


class Attack(ABC):
    """A map from the rows of honest workers to the rows of faulty workers.

    Attributes:
        scope: ``"own"``: needs only what a faulty worker would have sent; ``"columns"``: needs the honest rows too, but
            can treat blocks of columns separately; ``"rows"``: needs whole rows.
    """

    scope: Scope

    @abstractmethod
    def __call__(self, honest: Tensor, own: Tensor, generator: torch.Generator) -> Tensor:
        """Compute the rows that the faulty workers send.

        Args:
            honest: Rows of the honest workers, of shape (n − f, s); unused if the scope is ``"own"``.
            own: Rows that the faulty workers would have sent without the attack, of shape (f, s).
            generator: Source of randomness.

        Returns:
            Tensor of the shape, type and device of ``own``.
        """

    def state_dict(self) -> dict[str, object]:
        """Return the state that the next call depends on."""
        return {}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Restore what :meth:`state_dict` returned.

        Args:
            state: Result of :meth:`state_dict`.
        """
        expect(not state, "state", "empty", dict(state), "It belongs to another attack.")
