r"""Overlap-Local-SGD: an anchor that is one round old, and what pulls the models towards it.

Each of m ranks takes τ steps of its own optimizer, then, at a boundary, pulls its model back to the anchor,

.. math::
    x_i \leftarrow (1-\alpha)\, x_i + \alpha z ,

and the mean of the pulled-back models begins to travel. It is needed at the next boundary only,

.. math::
    v \leftarrow \beta v + (\bar x - z), \qquad z \leftarrow z + v ,

so that the exchange has τ steps of time. With models and anchor as columns and β = 0 a boundary is a product with

.. math::
    W = \begin{pmatrix} (1-\alpha) I & \tfrac{1-\alpha}{m} \mathbf 1 \\ \alpha \mathbf 1^\top & \alpha \end{pmatrix},

which leaves :math:`y = (1-\alpha)\bar x + \alpha z` where it is and shrinks the distances from it by 1 − α. A step of
every rank moves the anchor by only :math:`(1-\alpha)/(1-\alpha\beta)` of it in the long run.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def pull_back_(model: Tensor, anchor: Tensor, pullback: float) -> None:
    """Move a model towards the anchor, in place.

    Args:
        model: The model, or several as rows [x].
        anchor: The anchor [z].
        pullback: Share of the way [α].

    Example:
        >>> model = torch.tensor([1.0, 2.0])
        >>> pull_back_(model, torch.zeros(2), 0.75)
        >>> model
        tensor([0.2500, 0.5000])
    """
    model.lerp_(anchor.expand_as(model), pullback)


@torch.no_grad()
def move_anchor_(anchor: Tensor, velocity: Tensor, mean: Tensor, momentum: float) -> None:
    """Move the anchor towards the mean that has arrived, in place.

    The velocity is in units of the weights. In units of gradients a step size of zero would divide by zero.

    Args:
        anchor: The anchor [z].
        velocity: Its velocity [v].
        mean: Mean of the pulled-back models [x̄].
        momentum: What is left of the velocity [β].

    Example:
        >>> anchor, velocity = torch.tensor([0.0]), torch.tensor([1.0])
        >>> move_anchor_(anchor, velocity, torch.tensor([3.0]), 0.5)
        >>> anchor, velocity
        (tensor([3.5000]), tensor([3.5000]))
    """
    velocity.mul_(momentum).add_(mean).sub_(anchor)
    anchor.add_(velocity)


def effective_step(pullback: float, momentum: float) -> float:
    """How much of what every rank moves the anchor moves in the long run.

    Args:
        pullback: Share of the way back to the anchor [α].
        momentum: Of the anchor [β].

    Example:
        >>> round(effective_step(0.6, 0.7), 3), effective_step(0.5, 0.0)
        (0.69, 0.5)
    """
    return (1 - pullback) / (1 - pullback * momentum)


def velocity_scale(lr: float, previous: float) -> float:
    """What a change of the step size does to a velocity: it stays in proportion, where both are positive.

    Args:
        lr: Step size now.
        previous: Step size one round ago.

    Example:
        >>> velocity_scale(0.05, 0.1), velocity_scale(0.1, 0.0)
        (0.5, 1.0)
    """
    return lr / previous if lr > 0 and previous > 0 else 1.0
