r"""MaSS: the update, on lists of tensors.

The paper writes two sequences, with the gradient :math:`g_t` taken at :math:`u_t`,

.. math::
    w_{t+1} &= u_t - \eta_1 g_t \\
    u_{t+1} &= (1+\gamma)\, w_{t+1} - \gamma\, w_t + \eta_2 g_t .

Here the parameter holds :math:`u` and one buffer holds the rest. With :math:`r = \eta_2/\eta_1` and
:math:`b_t = (w_t - u_t)/\eta_1` the same iteration reads

.. math::
    b_{t+1} &= \gamma\, b_t + (\gamma - r)\, g_t \\
    u_{t+1} &= u_t - \eta_1 (g_t + b_{t+1}) .

The stored buffer is :math:`b/\gamma`, because that is the momentum buffer of ``torch.optim.SGD`` with
``nesterov=True`` and ``dampening`` :math:`r/\gamma`: torch's fused kernel therefore computes MaSS as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor

from lightning_sgd._validation import expect
from lightning_sgd.functional.optim.kernels import powers_of_two, runs


@dataclass(frozen=True, slots=True)
class MaSSCoefficients:
    """Coefficients of a step, besides the step size.

    Attributes:
        gamma: Acceleration [γ].
        ratio: Compensation per unit of step size [r = η2/η1].
    """

    gamma: float
    ratio: float

    @property
    def scale(self) -> float:
        """The factor from the stored buffer to b = (w − u)/η1: γ, or 1 for γ = 0, where the buffer is b itself."""
        return self.gamma or 1.0

    @property
    def gain(self) -> float:
        """Weight of the new gradient in the stored buffer."""
        return (self.gamma - self.ratio) / self.scale


def mass_coefficients(alpha: float, kappa_tilde: float) -> MaSSCoefficients:
    r"""Compute the coefficients from the paper's hyper-parameters.

    .. math:: \gamma = \frac{1-\alpha}{1+\alpha}, \qquad r = \frac{1 - 1/\tilde\kappa}{1+\alpha}

    Args:
        alpha: Inverse time scale of the acceleration [α], in (0, 1].
        kappa_tilde: Statistical condition number [κ̃], at least 1.

    Example:
        >>> mass_coefficients(alpha=0.05, kappa_tilde=2.0).gamma
        0.9047619047619047
    """
    return MaSSCoefficients(
        gamma=(1 - alpha) / (1 + alpha), ratio=(1 - 1 / kappa_tilde) / (1 + alpha)
    )


def mass_parameters_from_steps(gamma: float, eta2: float, lr: float) -> tuple[float, float]:
    """Return the (alpha, kappa_tilde) for which MaSS at step size ``lr`` has this ``gamma`` and ``eta2``.

    Args:
        gamma: Acceleration [γ], in [0, 1).
        eta2: Secondary step size [η2], in [0, lr·(1+γ)/2).
        lr: Step size [η1].

    Returns:
        The pair (alpha, kappa_tilde).

    Raises:
        ValueError: If no pair exists.

    Example:
        >>> mass_parameters_from_steps(gamma=0.5, eta2=0.0, lr=0.1)
        (0.3333333333333333, 1.0)
    """
    # κ̃ = 1/(1 − r(1+α)) is positive and finite only for r < 1/(1+α) = (1+γ)/2, hence the limit below.
    remedy = "MaSS needs the acceleration below 1 and a compensation smaller than the step itself."
    expect(0 <= gamma < 1, "gamma", "in [0, 1)", gamma, remedy)
    limit = lr * (1 + gamma) / 2
    expect(
        # With lr = 0, as at the start of a warm-up, the interval is empty, and Nesterov must stay possible.
        0 <= eta2 < limit or eta2 == 0,
        "eta2",
        f"in [0, lr·(1+gamma)/2) = [0, {limit:g})",
        eta2,
        remedy,
    )
    alpha = (1 - gamma) / (1 + gamma)
    ratio = eta2 / lr if eta2 else 0.0
    return alpha, 1 / (1 - ratio * (1 + alpha))


def mass_for_loop_(
    params: list[Tensor],
    grads: list[Tensor],
    buffers: list[Tensor],
    *,
    lr: float | Tensor,
    coefficients: MaSSCoefficients,
    weight_decay: float = 0.0,
    maximize: bool = False,
) -> None:
    """Make one MaSS step in place, tensor by tensor.

    Args:
        params: Parameters, holding u.
        grads: Gradients at u, of the shapes of ``params``; left as they are.
        buffers: Momentum buffers, of the shapes of ``params``; zeros before the first step.
        lr: Step size [η1].
        coefficients: See :func:`mass_coefficients`.
        weight_decay: Coupled L2 decay, added to the gradient.
        maximize: Ascend instead of descend.
    """
    for param, raw, buffer in zip(params, grads, buffers, strict=True):
        grad = raw.neg() if maximize else raw
        if weight_decay:
            grad = grad.add(param, alpha=weight_decay)
        buffer.mul_(coefficients.gamma).add_(grad, alpha=coefficients.gain)
        if isinstance(lr, Tensor):
            # A tensor as `alpha` would be read back to the host, which waits for the device and cuts autograd.
            param.sub_(grad * lr).sub_(buffer * (lr * coefficients.scale))
        else:
            param.add_(grad, alpha=-lr).add_(buffer, alpha=-lr * coefficients.scale)


def mass_foreach_(
    params: list[Tensor],
    grads: list[Tensor],
    buffers: list[Tensor],
    *,
    lr: float | Tensor,
    coefficients: MaSSCoefficients,
    weight_decay: float = 0.0,
    maximize: bool = False,
) -> None:
    """Make the step of :func:`mass_for_loop_` on whole lists: the same operations in the same order.

    The tensors of a list are of one device and dtype.
    """
    if maximize:
        grads = list(torch._foreach_neg(grads))
    if weight_decay:
        grads = list(torch._foreach_add(grads, params, alpha=weight_decay))
    torch._foreach_mul_(buffers, coefficients.gamma)
    torch._foreach_add_(buffers, grads, alpha=coefficients.gain)
    if isinstance(lr, Tensor):
        torch._foreach_sub_(params, torch._foreach_mul(grads, lr))
        torch._foreach_sub_(params, torch._foreach_mul(buffers, lr * coefficients.scale))
    else:
        torch._foreach_add_(params, grads, alpha=-lr)
        torch._foreach_add_(params, buffers, alpha=-lr * coefficients.scale)


def mass_fused_(
    params: list[Tensor],
    grads: list[Tensor],
    buffers: list[Tensor],
    *,
    lr: float | Tensor,
    coefficients: MaSSCoefficients,
    weight_decay: float = 0.0,
    maximize: bool = False,
) -> None:
    """Make the step of :func:`mass_for_loop_` as one call of torch's fused Nesterov kernel, for γ > 0.

    The public ``torch.optim.SGD`` refuses Nesterov together with dampening; the kernel behind it does not.
    Ask :func:`fused_mass_works` first: the kernel is private API.
    """
    torch._fused_sgd_(
        params,
        grads,
        buffers,
        weight_decay=weight_decay,
        momentum=coefficients.gamma,
        lr=lr,
        # The kernel weighs new gradients with 1 − dampening, which has to be (γ − r)/γ for a buffer that holds b/γ.
        dampening=1 - coefficients.gain,
        nesterov=True,
        maximize=maximize,
        # A first step would copy the gradient into the buffer without dampening; ours starts from zeros instead.
        is_first_step=False,
    )


# One probe for each kind of device and type. While torch.compile traces, a probe would become part of the graph.
@cache
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # torch has no annotations here
def fused_mass_works(device_type: str, dtype: torch.dtype) -> bool:
    """Return whether torch's kernel, here and now, makes the step that the paper defines.

    The answer is found by making one step of which the result is known: u = 1, g = 2, γ = ½, r = ⅕, η1 = 0.125
    leads to u = 0.675 with stored buffer 1.2, and multiples of these to multiples.

    Args:
        device_type: For example ``"cpu"`` or ``"cuda"``.
        dtype: Floating-point type of parameters, gradients and buffers.
    """
    one = powers_of_two(device_type, dtype)
    param, grad, buffer = one.clone(), one * 2, one * 0
    coefficients = MaSSCoefficients(gamma=0.5, ratio=0.2)
    if not runs(
        partial(mass_fused_, [param], [grad], [buffer], lr=0.125, coefficients=coefficients)
    ):
        return False
    # 0.675 and 1.2 are no binary fractions, so the kernel may round in another order than the test does.
    tolerance = 4 * torch.finfo(dtype).eps
    exact = (param / one - 0.675).abs() < tolerance, (buffer / one - 1.2).abs() < 2 * tolerance
    return all(bool(near.all()) for near in exact)
