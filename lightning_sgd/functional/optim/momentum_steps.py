"""Steps of SGD with momentum and of Adam on lists of tensors, each by a loop, multi-tensor operations or one kernel.

Unlike torch's optimizers they take any gradients, so that a method can change them without touching ``p.grad``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor

from lightning_sgd.functional.optim.kernels import powers_of_two, runs, signs


@dataclass(frozen=True, slots=True)
class AdamSettings:
    """Settings of a step of Adam, besides the step size.

    Attributes:
        beta1: Decay rate of the first moments [β₁].
        beta2: Decay rate of the second moments [β₂].
        eps: Added to the root of the second moments before their bias is corrected [ε].
        weight_decay: L2 penalty, added to the gradient.
    """

    beta1: float
    beta2: float
    eps: float
    weight_decay: float

    def corrections(self, t: int) -> tuple[float, float]:
        """Return the factor of the step size at step t, and the root of the bias of the second moments."""
        # The authors' code adds ε before the bias is corrected, as old versions of torch did; `torch.optim.Adam` adds
        # it after.
        root = math.sqrt(1 - self.beta2**t)
        return root / (1 - self.beta1**t), root


def sgd_for_loop_(
    params: list[Tensor],
    grads: list[Tensor],
    momenta: list[Tensor],
    *,
    lr: float | Tensor,
    momentum: float,
    weight_decay: float,
) -> None:
    """Make one step of SGD with momentum and coupled decay in place, tensor by tensor.

    Args:
        params: Parameters.
        grads: Gradients; left as they are.
        momenta: Momentum buffers; zeros before the first step.
        lr: Step size.
        momentum: Decay rate of the momentum.
        weight_decay: L2 penalty, added to the gradient.
    """
    for param, raw, buffer in zip(params, grads, momenta, strict=True):
        grad = raw.add(param, alpha=weight_decay) if weight_decay else raw
        # Zeros need no special first step: μ·0 + g is what torch's optimizer copies there.
        buffer.mul_(momentum).add_(grad)
        if isinstance(lr, Tensor):
            # A tensor as `alpha` would be read back to the host, which waits for the device.
            param.sub_(buffer * lr)
        else:
            param.add_(buffer, alpha=-lr)


def sgd_foreach_(
    params: list[Tensor],
    grads: list[Tensor],
    momenta: list[Tensor],
    *,
    lr: float | Tensor,
    momentum: float,
    weight_decay: float,
) -> None:
    """Make the step of :func:`sgd_for_loop_` on whole lists: the same operations in the same order.

    The tensors of a list are of one device and dtype.
    """
    if weight_decay:
        grads = list(torch._foreach_add(grads, params, alpha=weight_decay))
    torch._foreach_mul_(momenta, momentum)
    torch._foreach_add_(momenta, grads)
    if isinstance(lr, Tensor):
        torch._foreach_sub_(params, torch._foreach_mul(momenta, lr))
    else:
        torch._foreach_add_(params, momenta, alpha=-lr)


def sgd_fused_(
    params: list[Tensor],
    grads: list[Tensor],
    momenta: list[Tensor],
    *,
    lr: float | Tensor,
    momentum: float,
    weight_decay: float,
) -> None:
    """Make the step of :func:`sgd_for_loop_` as one call of torch's kernel, if :func:`fused_sgd_works`."""
    torch._fused_sgd_(
        params,
        grads,
        # Without momentum torch's optimizer hands over no buffers either.
        momenta if momentum else [],
        weight_decay=weight_decay,
        momentum=momentum,
        lr=lr,
        dampening=0.0,
        nesterov=False,
        maximize=False,
        is_first_step=False,
    )


def adam_for_loop_(
    params: list[Tensor],
    grads: list[Tensor],
    averages: list[Tensor],
    squares: list[Tensor],
    largest: list[Tensor] | None,
    steps: list[int],
    *,
    lr: float | Tensor,
    settings: AdamSettings,
) -> None:
    r"""Make one step of Adam in place, tensor by tensor.

    .. math:: w \leftarrow w - \eta\,\frac{\sqrt{1-\beta_2^t}}{1-\beta_1^t}\,\frac{m}{\sqrt v + \epsilon}

    Args:
        params: Parameters [w].
        grads: Gradients; left as they are.
        averages: First moments [m]; zeros before the first step.
        squares: Second moments [v]; zeros before the first step.
        largest: Largest second moments so far, to be divided by instead, or ``None``.
        steps: Number of steps of each parameter, this one included [t].
        lr: Step size [η].
        settings: See :class:`AdamSettings`.
    """
    for index, (param, raw, m, v) in enumerate(zip(params, grads, averages, squares, strict=True)):
        grad = raw.add(param, alpha=settings.weight_decay) if settings.weight_decay else raw
        m.lerp_(grad, 1 - settings.beta1)
        v.mul_(settings.beta2).addcmul_(grad, grad, value=1 - settings.beta2)
        factor, _ = settings.corrections(steps[index])
        if largest is None:
            # Outside of the root, where ε has the unit of a gradient; inside it would be that of a squared one.
            denominator = v.sqrt().add_(settings.eps)
        else:
            largest[index].copy_(torch.maximum(largest[index], v))
            denominator = largest[index].sqrt().add_(settings.eps)
        if isinstance(lr, Tensor):
            param.sub_(m / denominator * (lr * factor))
        else:
            param.addcdiv_(m, denominator, value=-lr * factor)


def adam_foreach_(
    params: list[Tensor],
    grads: list[Tensor],
    averages: list[Tensor],
    squares: list[Tensor],
    largest: list[Tensor] | None,
    steps: list[int],
    *,
    lr: float | Tensor,
    settings: AdamSettings,
) -> None:
    """Make the step of :func:`adam_for_loop_` on whole lists: the same operations in the same order.

    The tensors of a list are of one device and dtype.
    """
    if settings.weight_decay:
        grads = list(torch._foreach_add(grads, params, alpha=settings.weight_decay))
    torch._foreach_lerp_(averages, grads, 1 - settings.beta1)
    torch._foreach_mul_(squares, settings.beta2)
    torch._foreach_addcmul_(squares, grads, grads, 1 - settings.beta2)
    if largest is not None:
        torch._foreach_maximum_(largest, squares)
    denominators = list(torch._foreach_sqrt(squares if largest is None else largest))
    torch._foreach_add_(denominators, settings.eps)
    # Parameters that joined late, or had no gradient at times, count their own steps and so have factors of their own.
    factors = [settings.corrections(t)[0] for t in steps]
    if isinstance(lr, Tensor):
        updates = list(torch._foreach_div(averages, denominators))
        torch._foreach_mul_(updates, [lr * factor for factor in factors])
        torch._foreach_sub_(params, updates)
    else:
        torch._foreach_addcdiv_(params, averages, denominators, [-lr * f for f in factors])


def adam_fused_(
    params: list[Tensor],
    grads: list[Tensor],
    averages: list[Tensor],
    squares: list[Tensor],
    largest: list[Tensor] | None,
    steps: list[int],
    *,
    lr: float | Tensor,
    settings: AdamSettings,
) -> None:
    """Make the step of :func:`adam_for_loop_` by one call of torch's kernel for each number of steps.

    The kernel adds ε after the correction of the bias, hence ε divided by its root. It is private API: ask
    :func:`fused_adam_works` first.
    """
    # ε/root depends on t, and the kernel takes one ε for all tensors of a call.
    for t in sorted(set(steps)):
        chosen = [index for index, own in enumerate(steps) if own == t]
        _, root = settings.corrections(t)
        # The kernel reads the number of steps from tensors in single precision, whatever the type of the parameters.
        count = torch.full((), float(t), dtype=torch.float32, device=params[0].device)
        torch._fused_adam_(
            [params[index] for index in chosen],
            [grads[index] for index in chosen],
            [averages[index] for index in chosen],
            [squares[index] for index in chosen],
            [] if largest is None else [largest[index] for index in chosen],
            [count] * len(chosen),
            lr=lr,
            beta1=settings.beta1,
            beta2=settings.beta2,
            weight_decay=settings.weight_decay,
            eps=settings.eps / root,
            amsgrad=largest is not None,
            maximize=False,
        )


@cache
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # torch has no annotations here
def fused_sgd_works(device_type: str, dtype: torch.dtype) -> bool:
    """Check that torch's kernel makes the step w = 1, g = 2, m = 1, μ = ½, η = d = ⅛ → m = 21/8, w = 43/64.

    Multiples of these lead to multiples.

    Args:
        device_type: For example ``"cpu"`` or ``"cuda"``.
        dtype: Floating-point type of all tensors.
    """
    one = powers_of_two(device_type, dtype)
    param, buffer = one.clone(), one.clone()
    lists = [param], [one * 2], [buffer]
    if not runs(partial(sgd_fused_, *lists, lr=0.125, momentum=0.5, weight_decay=0.125)):
        return False
    return torch.equal(param, one * (43 / 64)) and torch.equal(buffer, one * (21 / 8))


@cache
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # torch has no annotations here
def fused_adam_works(device_type: str, dtype: torch.dtype) -> bool:
    """Check that torch's kernel makes the first step w = 1, g = 2, β₁ = β₂ = ½, ε = √2, η = ¼ → w = 7/8.

    Args:
        device_type: For example ``"cpu"`` or ``"cuda"``.
        dtype: Floating-point type of all tensors.
    """
    # A step of Adam is the same for g and 2g up to ε, so scaled copies would not scale it: signs tell the elements
    # apart.
    one = signs(device_type, dtype)
    param, m, v = one.clone(), one * 0, one * 0
    # ε as large as √v, so that a kernel which adds it in another place leads to another result.
    settings = AdamSettings(beta1=0.5, beta2=0.5, eps=math.sqrt(2), weight_decay=0.0)
    lists = [param], [one * 2], [m], [v], None, [1]
    if not runs(partial(adam_fused_, *lists, lr=0.25, settings=settings)):
        return False
    tolerance = 4 * torch.finfo(dtype).eps
    near = (param / one - 7 / 8).abs() < tolerance, (v - 2).abs() < 2 * tolerance
    return all(bool(each.all()) for each in near)
