r"""Gossip SGD with periodic global averages: how models are mixed, and how the period adapts.

Between two global averages each of n ranks takes a step and continues from the weighted mean of its own model and
those of its neighbours in a graph,

.. math::
    x_i^{k+1} = \sum_j w_{ij}\, (x_j^k - \gamma_k\, g_j(x_j^k)),

and after every H-th step from the mean of all models. H = 1 is parallel SGD, W = I Local SGD, H = ∞ gossip SGD. The
mixed model is computed as

.. math::
    x_i + \sum_{j \ne i} w_{ij}\, (q_j - q_i),

where q_j is what rank j sends: x_j, or x_j rounded. For a doubly stochastic W rounding does not change the mean, and
equal models stay equal to the last bit. Rounded to bfloat16 every difference has an error of at most
:math:`2^{-8} \max_j |x_j|`, and ranks cannot come closer to each other than about that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_sgd._validation import expect


@torch.no_grad()
def weighted_differences(
    sent: Tensor, received: Sequence[Tensor], weights: Sequence[float], dtype: torch.dtype
) -> Tensor:
    r"""Return what a round adds to a model: :math:`\sum_j w_{ij} (q_j - q_i)`.

    Args:
        sent: Model that this rank sent [q_i].
        received: Models that it received [q_j].
        weights: Weight of each received model [w_ij].
        dtype: Type of the sum and of the result.

    Example:
        >>> weighted_differences(torch.ones(2), [torch.tensor([2.0, 3.0])], [0.5], torch.float32)
        tensor([0.5000, 1.0000])
    """
    total = torch.zeros_like(sent, dtype=dtype)
    for tensor, weight in zip(received, weights, strict=True):
        # Of what was sent, not of the own model before rounding: only then do the differences of two ranks cancel in
        # the mean.
        total.add_(tensor.to(dtype) - sent.to(dtype), alpha=weight)
    return total


class Smoothed:
    """Moving average of losses, a scalar on their device; losses that are not finite are ignored.

    Args:
        decay: Weight of the past, in [0, 1).

    Example:
        >>> smoothed = Smoothed(0.5)
        >>> for loss in 4.0, 2.0, float("nan"):
        ...     smoothed.update(torch.tensor(loss))
        >>> smoothed.value
        tensor(3., dtype=torch.float64)
    """

    def __init__(self, decay: float) -> None:
        self.decay, self.value = decay, torch.tensor(math.nan, dtype=torch.float64)

    @torch.no_grad()
    def update(self, loss: Tensor) -> None:
        """Update the average by a loss, a scalar tensor."""
        # By `torch.where`: reading the number on the host would wait for the device.
        new = loss.detach().double()
        old = self.value.to(new.device)
        mean = torch.where(old.isfinite(), self.decay * old + (1 - self.decay) * new, new)
        self.value = torch.where(new.isfinite(), mean, old)


class AdaptivePeriod:
    r"""Period that grows as the loss falls [H]: late steps are small and need fewer global averages.

    .. math::
        H = \left\lceil (F_0 / F)^{1/4}\, H_0 \right\rceil

    F is the loss at a global average. During the warm-up F_0 is updated to the mean of itself and F; after it, it
    stays. A loss that is not finite or not positive changes nothing.

    Args:
        initial: Period until the end of the warm-up [H₀].
        warmup_steps: Steps of the warm-up [K_w]; the first loss is F_0 in any case.
        smallest: Lower bound of the period.
        largest: Upper bound of the period.

    Example:
        >>> period = AdaptivePeriod(initial=4)
        >>> periods = []
        >>> for step, loss in enumerate([6.9, 3.0, 2.0, float("nan"), 0.0]):
        ...     period.update(step, loss)
        ...     periods.append(period.value)
        >>> periods
        [4, 5, 6, 6, 6]
    """

    def __init__(
        self, initial: int, warmup_steps: int = 0, smallest: int = 1, largest: int = 64
    ) -> None:
        remedy = "The period starts at `period` and stays between both bounds."
        in_order = 1 <= smallest <= initial <= largest
        expect(in_order, "period", f"in [{smallest}, {largest}]", initial, remedy)
        expect(warmup_steps >= 0, "warmup_steps", "at least 0", warmup_steps, "The default is 0.")
        self.initial, self.warmup_steps = initial, warmup_steps
        self.smallest, self.largest = smallest, largest
        self.value, self.reference = initial, math.nan

    def update(self, step: int, loss: float) -> None:
        """Update the period by the mean loss over the ranks at a global average [F].

        Args:
            step: Optimizer steps so far.
            loss: Mean loss, the same on all ranks.
        """
        if not (math.isfinite(loss) and loss > 0):
            return
        # From the first loss and not from 0, with which the first mean would be half of it.
        if math.isnan(self.reference):
            self.reference = loss
        elif step < self.warmup_steps:
            self.reference = (self.reference + loss) / 2
        if step >= self.warmup_steps:
            # Every rank must come to the same H, or some would wait in an all-reduce and others for neighbours: hence
            # the mean loss.
            period = math.ceil((self.reference / loss) ** 0.25 * self.initial)
            self.value = min(max(period, self.smallest), self.largest)

    def state_dict(self) -> dict[str, Any]:
        """Return period and reference loss."""
        return {"value": self.value, "reference": self.reference}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self.value, self.reference = state["value"], state["reference"]
