"""Attacks that use the rows of the honest workers."""

from __future__ import annotations

import copy
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from lightning_sgd._validation import expect, expect_one_of, is_finite_at_least
from lightning_sgd.aggregation._aggregator import Aggregator
from lightning_sgd.aggregation._attack import Attack, Scope
from lightning_sgd.functional.robust.attacks import alie_factor, largest_hidden_factor, maximize

Sign: TypeAlias = Literal[-1, 1]
Direction: TypeAlias = Literal["alie", "ipm"]


class SignFlip(Attack):
    """Send minus the worker's own gradient, or minus the mean of the honest gradients.

    Args:
        omniscient: Whether to flip the mean of the honest gradients instead of the worker's own.

    Example:
        >>> attack = SignFlip()
        >>> attack(torch.ones(3, 1), torch.tensor([[2.0]]), torch.Generator())
        tensor([[-2.]])
    """

    def __init__(self, omniscient: bool = False) -> None:
        self.omniscient = omniscient
        self.scope = "columns" if omniscient else "own"

    def __call__(self, honest: Tensor, own: Tensor, generator: torch.Generator) -> Tensor:
        """Return rows of the opposite sign."""
        return -honest.mean(dim=0).expand_as(own) if self.omniscient else -own


class IPM(Attack):
    """Inner-product manipulation, or fall of empires: −ε times the mean of the honest rows.

    Args:
        epsilon: Factor [ε]; 0.1 is hard to tell from honest rows; above n/f − 1 the mean changes its sign.

    Example:
        >>> IPM(0.5)(torch.tensor([[2.0], [4.0]]), torch.zeros(1, 1), torch.Generator())
        tensor([[-1.5000]])

    Reference:
        Cong Xie, Oluwasanmi Koyejo, Indranil Gupta. Fall of Empires: Breaking Byzantine-tolerant SGD by Inner Product
        Manipulation. UAI 2019.
    """

    scope: Scope = "columns"

    def __init__(self, epsilon: float = 0.1) -> None:
        fits = is_finite_at_least(epsilon, 0.0)
        expect(fits, "epsilon", "a number that is not negative", epsilon, "The default is 0.1.")
        self.epsilon = epsilon

    def __call__(self, honest: Tensor, own: Tensor, generator: torch.Generator) -> Tensor:
        """Return the same row for all faulty workers."""
        return (-self.epsilon * honest.mean(dim=0)).expand_as(own)


class ALIE(Attack):
    r"""A little is enough: :math:`\mu - z \sigma`, off by less than honest workers are, in every coordinate.

    Args:
        z: How many standard deviations; by default the paper's formula, by which a majority is on the attacker's
            side, and 1.5 where it gives no positive number, as for few workers.
        sign: Of the deviation, −1 or 1.

    Example:
        >>> ALIE(z=1.0)(torch.tensor([[0.0], [2.0], [4.0]]), torch.zeros(1, 1), torch.Generator())
        tensor([[0.]])

    Reference:
        Gilad Baruch, Moran Baruch, Yoav Goldberg. A Little Is Enough: Circumventing Defenses For Distributed Learning.
        NeurIPS 2019.
    """

    scope: Scope = "columns"

    def __init__(self, z: float | None = None, sign: Sign = -1) -> None:
        fits = z is None or is_finite_at_least(z, 0.0)
        expect(fits, "z", "a number that is not negative", z, "1.5 is common.")
        expect_one_of(sign, Sign, "sign", "The default is −1.")
        self.z, self.sign = z, sign

    def __call__(self, honest: Tensor, own: Tensor, generator: torch.Generator) -> Tensor:
        """Return the same row for all faulty workers."""
        z = self.z
        if z is None:
            z = alie_factor(len(honest) + len(own), len(own))
            z = (
                z if z > 0 else 1.5
            )  # the formula is below 0 for n = 8, f = 1: an attack that would help
        return (honest.mean(dim=0) + self.sign * z * _deviation(honest)).expand_as(own)


class MinMax(Attack):
    r"""Go as far along −σ as possible without being farther from any honest row than two honest rows are.

    :math:`\mu - \gamma \sigma` with the largest γ for which this holds, or, with ``by_sum``, for which its squared
    distances add up to no more than those of an honest row.

    Args:
        by_sum: Compare sums of squared distances: the attack that is known as min-sum.

    Example:
        >>> MinMax()(torch.tensor([[-1.0], [0.0], [1.0]]), torch.zeros(1, 1), torch.Generator())
        tensor([[-1.]])

    Reference:
        Virat Shejwalkar, Amir Houmansadr. Manipulating the Byzantine: Optimizing Model Poisoning Attacks and Defenses
        for Federated Learning. NDSS 2021.
    """

    scope: Scope = "rows"

    def __init__(self, by_sum: bool = False) -> None:
        self.by_sum = by_sum

    def __call__(self, honest: Tensor, own: Tensor, generator: torch.Generator) -> Tensor:
        """Return the same row for all faulty workers."""
        direction = -_deviation(honest)
        gamma = largest_hidden_factor(honest, direction, by_sum=self.by_sum)
        return (honest.mean(dim=0) + gamma * direction).expand_as(own)


class OptimalFactor(Attack):
    r"""The factor that moves a known rule farthest: :math:`\mu - \gamma \sigma` or :math:`\mu - \gamma \mu`.

    Args:
        rule: The rule under attack; it is called on the rows of all workers, the honest ones first.
        direction: ``"alie"`` for −σ, ``"ipm"`` for −μ.
        num_evaluations: How many factors to try: doubled while the error grows, then refined around the best.

    Example:
        >>> from lightning_sgd.aggregation import CoordinateMedian
        >>> attack = OptimalFactor(CoordinateMedian(1), "ipm")
        >>> honest = torch.tensor([[1.0], [2.0], [3.0]])
        >>> bool(attack(honest, torch.zeros(1, 1), torch.Generator()) < 1.0)  # beyond, it makes no difference
        True
    """

    scope: Scope = "rows"

    def __init__(
        self,
        rule: Aggregator,
        direction: Direction = "alie",
        num_evaluations: int = 16,
    ) -> None:
        expect_one_of(direction, Direction, "direction")
        expect(
            num_evaluations >= 2, "num_evaluations", "at least 2", num_evaluations, "16 is usual."
        )
        self.rule, self.direction, self.num_evaluations = rule, direction, num_evaluations

    def __call__(self, honest: Tensor, own: Tensor, generator: torch.Generator) -> Tensor:
        """Return the same row for all faulty workers."""
        mean = honest.mean(dim=0)
        direction = -_deviation(honest) if self.direction == "alie" else -mean

        def error(factor: float) -> float:
            sent = (mean + factor * direction).expand_as(own)
            # A copy: trying a factor must not advance the state of the rule.
            result = copy.deepcopy(self.rule)(torch.cat([honest, sent]))
            return float((result - mean).norm())

        return (mean + maximize(error, self.num_evaluations) * direction).expand_as(own)


def _deviation(honest: Tensor) -> Tensor:
    """Return the standard deviation of each column, dividing by one less than the number of rows."""
    # One row has no deviation; torch would give NaN, and the attack would be one of NaN.
    return honest.std(dim=0) if len(honest) > 1 else torch.zeros_like(honest[0])
