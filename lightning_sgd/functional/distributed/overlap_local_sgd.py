r"""Overlap-Local-SGD: models are pulled towards an anchor, the mean of the models one round ago.

Each of m ranks takes τ steps of its own optimizer, then, at a boundary, pulls its model back towards the anchor,

.. math::
    x_i \leftarrow (1-\alpha)\, x_i + \alpha z ,

and the ranks start to average the pulled-back models. The mean is needed only at the next boundary,

.. math::
    v \leftarrow \beta v + (\bar x - z), \qquad z \leftarrow z + v ,

so that the average may take τ steps of time. With models and anchor as columns and β = 0 a boundary multiplies by

.. math::
    W = \begin{pmatrix} (1-\alpha) I & \tfrac{1-\alpha}{m} \mathbf 1 \\ \alpha \mathbf 1^\top & \alpha \end{pmatrix},

which keeps :math:`y = (1-\alpha)\bar x + \alpha z` and shrinks the distances from it by the factor 1 − α. In the long
run a step of every rank moves the anchor by only :math:`(1-\alpha)/(1-\alpha\beta)` of its size.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def pull_back_(model: Tensor, anchor: Tensor, pullback: float) -> None:
    """Move a model towards the anchor, in place.

    Args:
        model: Model, or several as rows [x].
        anchor: Anchor [z].
        pullback: Share of the way [α].

    Example:
        >>> model = torch.tensor([1.0, 2.0])
        >>> pull_back_(model, torch.zeros(2), 0.75)
        >>> model
        tensor([0.2500, 0.5000])
    """
    # A model that equals the anchor stays equal to the last bit.
    model.lerp_(anchor.expand_as(model), pullback)


@torch.no_grad()
def move_anchor_(anchor: Tensor, velocity: Tensor, mean: Tensor, momentum: float) -> None:
    """Move the anchor towards the mean of the pulled-back models, in place.

    The velocity has the unit of the weights: in units of gradients, a step size of zero would divide by zero.

    Args:
        anchor: Anchor [z].
        velocity: Velocity of the anchor [v].
        mean: Mean of the pulled-back models [x̄].
        momentum: Factor of the old velocity [β].

    Example:
        >>> anchor, velocity = torch.tensor([0.0]), torch.tensor([1.0])
        >>> move_anchor_(anchor, velocity, torch.tensor([3.0]), 0.5)
        >>> anchor, velocity
        (tensor([3.5000]), tensor([3.5000]))
    """
    # The same on all ranks, because anchor and mean are. The authors keep a velocity on each rank and average the
    # anchors, which is the same by linearity.
    velocity.mul_(momentum).add_(mean).sub_(anchor)
    anchor.add_(velocity)


def effective_step(pullback: float, momentum: float) -> float:
    """Return the share of a step of all ranks by which the anchor moves in the long run.

    Args:
        pullback: Share of the way back to the anchor [α].
        momentum: Momentum of the anchor [β].

    Example:
        >>> round(effective_step(0.6, 0.7), 3), effective_step(0.5, 0.0)
        (0.69, 0.5)
    """
    # 0.69 for the authors' α = 0.6 and β = 0.7: at an equal step size the method is slower than Local SGD.
    return (1 - pullback) / (1 - pullback * momentum)


def velocity_scale(lr: float, previous: float) -> float:
    """Return the factor that keeps a velocity in proportion to the step size, if both step sizes are positive.

    Args:
        lr: Present step size.
        previous: Step size one round ago.

    Example:
        >>> velocity_scale(0.05, 0.1), velocity_scale(0.1, 0.0)
        (0.5, 1.0)
    """
    return lr / previous if lr > 0 and previous > 0 else 1.0
