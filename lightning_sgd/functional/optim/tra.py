r"""Trajectory regularisation: stages, anchors and the pull towards them, on lists of tensors.

Training is cut into stages of S steps. At the start of a stage the parameters w become its anchor a, and within it the
gradient is that of the loss plus :math:`\lambda\|w - a\|^2`,

.. math:: d = g + 2\lambda\,(w - a), \qquad \lambda = \lambda_w / \eta,

with the step size η of the schedule; the step itself is made with :math:`\eta/(k+1)` at position k = 0, …, S − 1 of the
stage. So one step pulls by :math:`2\lambda_w/(k+1)` of the deviation, whatever η is.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor

InnerDecay: TypeAlias = Literal["harmonic", "none"]


def inner_step_size(
    lr: float | Tensor, position: int, inner_lr_decay: InnerDecay
) -> float | Tensor:
    """Compute the step size at a position of a stage.

    Args:
        lr: Step size of the schedule [η].
        position: Steps made in this stage [k].
        inner_lr_decay: ``"harmonic"`` divides by k + 1.

    Example:
        >>> [inner_step_size(0.6, position, "harmonic") for position in range(3)]
        [0.6, 0.3, 0.19999999999999998]
    """
    return lr / (position + 1) if inner_lr_decay == "harmonic" else lr


def pull_strength(lambda_w: float, lr: float | Tensor) -> float | Tensor:
    """Compute the factor of the deviation from the anchor in the gradient [2λ]; 0 where the step size is 0.

    Args:
        lambda_w: Strength of the regularisation per unit of step size [λ_w].
        lr: Step size of the schedule [η], not the one within the stage.

    Example:
        >>> pull_strength(0.25, 0.5), pull_strength(0.25, 0.0)
        (1.0, 0.0)
    """
    # `where` instead of `if`: the value of a tensor is known only after waiting for the device.
    if isinstance(lr, Tensor):
        return torch.where(lr == 0, torch.zeros_like(lr), 2 * lambda_w / lr)
    # A warm-up starts at step size zero, where nothing moves and λ_w/η would be infinite.
    return 2 * lambda_w / lr if lr else 0.0


def regularized_gradients(
    params: list[Tensor], grads: list[Tensor], anchors: list[Tensor], strength: float | Tensor
) -> list[Tensor]:
    """Compute the gradients of the loss plus the regularisation, in new tensors.

    Args:
        params: Parameters [w], of one device and dtype.
        grads: Gradients of the loss [g].
        anchors: Where the parameters were at the start of the stage [a].
        strength: See :func:`pull_strength`.

    Example:
        >>> w, g, a = torch.tensor([1.0]), torch.tensor([0.5]), torch.tensor([3.0])
        >>> regularized_gradients([w], [g], [a], 0.2)
        [tensor([0.1000])]
    """
    # New tensors: the authors' code adds to `p.grad` in place, which spoils logged norms and accumulated gradients.
    pulls = list(torch._foreach_sub(params, anchors))
    torch._foreach_mul_(pulls, strength)
    torch._foreach_add_(pulls, grads)
    return pulls


def next_position(position: int, inner_steps: int) -> int:
    """Return the position after one more step; 0 when the stage is over.

    Args:
        position: Steps made in this stage before [k].
        inner_steps: Steps of a stage [S].

    Example:
        >>> next_position(0, 2), next_position(1, 2)
        (1, 0)
    """
    return position + 1 if position + 1 < inner_steps else 0
