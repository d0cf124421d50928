"""Arithmetic of attacks: hidden factors, flipped bits, and the search for the worst factor."""

from __future__ import annotations

from collections.abc import Callable
from statistics import NormalDist

import torch
from torch import Tensor

from lightning_sgd.functional.robust.stacked_rows import squared_distances


def alie_factor(num_workers: int, num_byzantine: int) -> float:
    """Compute by how many standard deviations a faulty row may differ and still be in the majority [z].

    Args:
        num_workers: Number of workers [n].
        num_byzantine: How many of them are faulty [f].

    Returns:
        The quantile (n − f − s)/(n − f) of the normal distribution, s = ⌊n/2 + 1⌋ − f; for few workers it is zero or
        less.

    Example:
        >>> round(alie_factor(20, 4), 4), round(alie_factor(8, 1), 4)
        (0.1573, -0.18)
    """
    num_honest = num_workers - num_byzantine
    # So many honest workers the attackers need on their side to be a majority.
    num_supporters = num_workers // 2 + 1 - num_byzantine
    return NormalDist().inv_cdf((num_honest - num_supporters) / num_honest)


def largest_hidden_factor(honest: Tensor, direction: Tensor, *, by_sum: bool) -> float:
    r"""Find the largest γ for which mean + γ · direction is no farther from honest rows than they are from each other.

    Each squared distance is a quadratic :math:`\lVert e_i \rVert^2 + 2 \gamma \langle e_i, v \rangle + \gamma^2
    \lVert v \rVert^2` in γ, :math:`e_i = \mu - x_i`, so that γ is a root.

    Args:
        honest: Rows of the honest workers, of shape (h, d).
        direction: Direction of the attack, of shape (d,) [v].
        by_sum: Compare sums of squared distances (min-sum) instead of the largest distance (min-max).

    Example:
        >>> honest = torch.tensor([[-1.0], [0.0], [1.0]])
        >>> largest_hidden_factor(honest, torch.ones(1), by_sum=False)
        1.0
    """
    # Centred first: limits and distances are small differences of rows that may have a large common part.
    centred = (honest - honest.mean(dim=0)).double()
    distances = squared_distances(centred @ centred.mT)
    limit = distances.sum(dim=1).max() if by_sum else distances.max()
    a = direction.double().square().sum()
    b, c = -(centred @ direction.double()), centred.square().sum(dim=1) - limit
    if by_sum:
        a, b, c = a * len(honest), b.sum(), centred.square().sum() - limit
    # The larger root of each quadratic; γ must not exceed any of them.
    # A direction of zero, from equal honest rows, gives the factor zero instead of 0/0.
    roots = (-b + (b.square() - a * c).clamp_min(0.0).sqrt()) / a.clamp_min(1e-300)
    return float(roots.min())


def flip_exponent_bit(values: Tensor, bit: int) -> Tensor:
    """Flip one bit of the exponent of each value, as a memory fault does.

    Args:
        values: Numbers in single precision.
        bit: Number of the bit within the exponent, from 0, the lowest, to 7.

    Example:
        >>> flip_exponent_bit(torch.tensor([1.0, 2.0]), 1)
        tensor([0.2500, 8.0000])
    """
    # The exponent follows the 23 bits of the fraction.
    flipped = values.float().view(torch.int32) ^ (1 << (23 + bit))
    return flipped.view(torch.float32)


def maximize(function: Callable[[float], float], num_evaluations: int) -> float:
    """Search the best argument from 0 to infinity with steps that double while they improve, and then shrink.

    Args:
        function: Function to maximize.
        num_evaluations: Number of times it may be called.

    Example:
        >>> round(maximize(lambda x: -abs(x - 5.3), 30), 1)
        5.3
    """
    best, value, step = 0.0, function(0.0), 1.0
    expanding, sign = True, 1
    for _ in range(num_evaluations - 1):
        candidate = max(0.0, best + sign * step)
        attained = function(candidate)
        if attained > value:
            best, value = candidate, attained
            step = 2 * step if expanding else step
            continue
        expanding = False
        sign, step = -sign, 0.8 * step
    return best
