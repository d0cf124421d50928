"""Attacks that do not use the honest rows, and faults of memory, arithmetic and data."""

from __future__ import annotations

from typing import ClassVar, Literal, TypeAlias

import torch
from torch import Tensor

from lightning_sgd._validation import expect, expect_one_of, is_finite_at_least
from lightning_sgd.aggregation._attack import Attack, Scope
from lightning_sgd.functional.robust.attacks import flip_exponent_bit


class GaussianAttack(Attack):
    """Independent normal noise in place of a gradient.

    Args:
        mean: Mean of every coordinate.
        std: Standard deviation of every coordinate.

    Example:
        >>> GaussianAttack(std=0.0)(torch.ones(2, 1), torch.ones(1, 1), torch.Generator())
        tensor([[0.]])
    """

    scope: Scope = "own"

    def __init__(self, mean: float = 0.0, std: float = 1.0) -> None:
        fits = is_finite_at_least(std, 0.0)
        expect(fits, "std", "a number that is not negative", std, "The default is 1.")
        self.mean, self.std = mean, std

    def __call__(self, honest: Tensor, own: Tensor, generator: torch.Generator) -> Tensor:
        """Return a different row for every faulty worker."""
        # On the generator's device, so that the numbers are the same whatever device the rows are on.
        noise = torch.randn(own.shape, generator=generator, device=generator.device)
        return (self.mean + self.std * noise).to(own)


class ConstantAttack(Attack):
    """The same number in every coordinate, such as 0 for a worker that does not train.

    Args:
        value: The number.

    Example:
        >>> ConstantAttack(3.0)(torch.ones(2, 1), torch.ones(1, 1), torch.Generator())
        tensor([[3.]])
    """

    scope: Scope = "own"

    def __init__(self, value: float = 0.0) -> None:
        self.value = float(value)

    def __call__(self, honest: Tensor, own: Tensor, generator: torch.Generator) -> Tensor:
        """Return the same row for all faulty workers."""
        return torch.full_like(own, self.value)


NotANumber: TypeAlias = Literal["nan", "inf"]


class NonFinite(ConstantAttack):
    """NaN or infinity in every coordinate: one such row makes a mean useless.

    Args:
        value: Which of the two.

    Example:
        >>> NonFinite("inf")(torch.ones(2, 1), torch.ones(1, 1), torch.Generator())
        tensor([[inf]])
    """

    def __init__(self, value: NotANumber = "nan") -> None:
        expect_one_of(value, NotANumber, "value", "ConstantAttack takes numbers.")
        super().__init__(float(value))


class BitFlip(Attack):
    """The own gradient after memory faults: one bit of the exponent flipped in some random coordinates.

    Args:
        num_coordinates: How many coordinates are hit [k], in each faulty row.
        bit: Which bit of the exponent, from 0, the lowest, to 7, the highest, which makes small numbers huge.

    Example:
        >>> BitFlip(num_coordinates=1, bit=1)(torch.ones(2, 1), torch.ones(1, 1), torch.Generator())
        tensor([[0.2500]])
    """

    scope: Scope = "own"

    def __init__(self, num_coordinates: int = 1, bit: int = 7) -> None:
        remedy = "One is a fault."
        expect(num_coordinates >= 1, "num_coordinates", "at least 1", num_coordinates, remedy)
        expect(bit in range(8), "bit", "from 0 to 7", bit, "The exponent has eight bits.")
        self.num_coordinates, self.bit = num_coordinates, bit

    def __call__(self, honest: Tensor, own: Tensor, generator: torch.Generator) -> Tensor:
        """Return a different row for every faulty worker."""
        sent = own.clone()
        for row in sent:
            # With replacement: a coordinate that is drawn twice is flipped once.
            hit = torch.randint(
                row.numel(), (self.num_coordinates,), generator=generator, device=generator.device
            ).to(row.device)
            row[hit] = flip_exponent_bit(row[hit], self.bit).to(row)
        return sent


class LabelFlip:
    """Labels y turned into K − 1 − y in the batches of a faulty worker, which then trains honestly on them.

    Args:
        num_classes: Number of classes [K].

    Example:
        >>> LabelFlip(num_classes=10)(torch.tensor([0, 3, 9]))
        tensor([9, 6, 0])
    """

    scope: ClassVar[str] = "labels"

    def __init__(self, num_classes: int) -> None:
        expect(num_classes >= 2, "num_classes", "at least 2", num_classes, "Count the classes.")
        self.num_classes = num_classes

    def __call__(self, labels: Tensor) -> Tensor:
        """Flip labels.

        Args:
            labels: Classes from 0 to K − 1, of any shape.
        """
        return self.num_classes - 1 - labels
