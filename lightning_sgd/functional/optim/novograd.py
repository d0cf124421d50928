r"""NovoGrad: the update, on lists of tensors.

For one parameter tensor w with gradient g, momentum m and a single number v,

.. math::
    v &\leftarrow \beta_2 v + (1-\beta_2)\,\|g\|^2 \\
    m &\leftarrow \beta_1 m + a\,g + b\,w \\
    w &\leftarrow w - \lambda\,c\,m ,

where :math:`v \leftarrow \|g\|^2` in the first step with a gradient other than zero, which removes the bias. Weight
decay d and the three published forms differ in the coefficients alone:

============  =================================  =====  =========
form          a                                  b      c
============  =================================  =====  =========
paper         :math:`\gamma/(\sqrt v+\epsilon)`  γd     1
openseq2seq   :math:`\gamma/\sqrt{v+\epsilon}`   γd     1
apex          γ                                  0      see below
============  =================================  =====  =========

.. math:: c = \frac{1}{1-\beta_1^t} \cdot \frac{1}{\sqrt{v/(1-\beta_2^t)}+\epsilon}

γ is 1, or 1 − β₁ with gradient averaging; the paper's form takes 1 in the first step all the same. With
:math:`a = 1 - \text{dampening}` the last two lines are SGD with momentum, for which torch has a fused kernel.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, partial
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from lightning_sgd.functional.optim.kernels import (
    powers_of_two,
    runs,
    small_by_shape,
    squared_norms,
    stack_scaled,
)

NovoGradVariant: TypeAlias = Literal["paper", "apex", "openseq2seq"]

Lists: TypeAlias = tuple[list[Tensor], list[Tensor], list[Tensor]]
"""Parameters, gradients and momenta."""

_SMALLEST_DENOMINATOR = 1e-30
"""Below the root of the smallest float: it only keeps 0/0 from arising where v and eps are both zero."""
_SMALLEST_GAIN = 1e-6
"""Below it, 1 − dampening has lost too many digits to stand for a."""


@dataclass(frozen=True, slots=True)
class NovoGradSettings:
    """Settings of a step of NovoGrad, besides the step size.

    Attributes:
        beta1: Decay rate of the momentum [β₁].
        beta2: Decay rate of the second moments [β₂].
        eps: Added to the denominator [ε].
        weight_decay: Decay inside the momentum [d]; the form of apex has none there.
        grad_averaging: Weigh what enters the momentum with 1 − β₁.
        variant: Which published form.
    """

    beta1: float
    beta2: float
    eps: float = 1e-8
    weight_decay: float = 0.0
    grad_averaging: bool = False
    variant: NovoGradVariant = "paper"

    @property
    def uniform(self) -> bool:
        """Whether b and c are the same for all tensors at all times."""
        return self.variant != "apex" and not (self.grad_averaging and self.weight_decay)


@dataclass(frozen=True, slots=True)
class NovoGradCoefficients:
    """The numbers of the module's formulas.

    Attributes:
        gradient: Weight of the gradient in the momentum [a], of shape (number of tensors,).
        decay: Weight of the parameters in the momentum [b], one for all or of shape (number of tensors,).
        step: Factor of the step size [c], of shape (number of tensors,); ``None`` stands for 1.
    """

    gradient: Tensor
    decay: float | Tensor
    step: Tensor | None = None


def novograd_coefficients_(
    grads: list[Tensor],
    second_moments: Tensor,
    largest: Tensor | None,
    steps: Tensor | None,
    settings: NovoGradSettings,
) -> NovoGradCoefficients:
    """Update the second moments in place and return the coefficients of the step.

    Nothing waits for the device.

    Args:
        grads: Gradients of one device; left as they are.
        second_moments: One number per tensor [v], of shape (number of tensors,), changed in place; zero as long as no
            gradient other than zero came.
        largest: The largest v so far, of the same shape, changed in place; ``None`` divides by v itself.
        steps: Number of steps so far, this one included, of the same shape, for the form of apex.
        settings: See :class:`NovoGradSettings`.
    """
    # The norm is that of the gradient alone: decay comes after the normalization, so it does not disturb the
    # statistics.
    squares = squared_norms(grads, second_moments.dtype)
    # Not the first step but the first gradient other than zero: from v = 0 a step is 1/√(1 − β₂) times too long.
    # A comparison on the device, because an `if` would wait for it.
    first = second_moments == 0
    # In this form, unlike in β₂v + (1 − β₂)‖g‖², an overflow becomes NaN at the next step and is seen.
    new = torch.where(first, squares, second_moments.lerp(squares, 1 - settings.beta2))
    second_moments.copy_(new)
    # v goes on by its own recursion; only the divisor is the maximum.
    if largest is not None:
        new = torch.maximum(largest, new)
        largest.copy_(new)
    if settings.variant == "apex":
        assert steps is not None
        return _coefficients_of_apex(new, steps, settings)
    if settings.variant == "openseq2seq":
        # OpenSeq2Seq alone puts ε inside the root, and weighs with 1 − β₁ in the first step, too.
        scale = _reciprocal((new + settings.eps).sqrt())
        first = torch.zeros_like(first)
    else:
        # Outside of the root, as all other implementations have it.
        scale = _reciprocal(new.sqrt() + settings.eps)
    if not settings.grad_averaging:
        return NovoGradCoefficients(scale, settings.weight_decay)
    # The paper's first momentum is the whole normalized gradient: that removes the bias which averaging would bring.
    gain = torch.where(first & (squares > 0), 1.0, torch.full_like(new, 1 - settings.beta1))
    return NovoGradCoefficients(scale * gain, settings.weight_decay * gain)


def _coefficients_of_apex(v: Tensor, t: Tensor, settings: NovoGradSettings) -> NovoGradCoefficients:
    # v starts without bias and apex divides by the bias all the same, so its first steps are shorter by √(1 − β₂ᵗ).
    root = (v / (1 - settings.beta2**t)).sqrt()
    step = _reciprocal(root + settings.eps) / (1 - settings.beta1**t)
    gain = 1 - settings.beta1 if settings.grad_averaging else 1.0
    return NovoGradCoefficients(torch.full_like(v, gain), 0.0, step)


def _reciprocal(denominator: Tensor) -> Tensor:
    return denominator.clamp(min=_SMALLEST_DENOMINATOR).reciprocal()


def novograd_for_loop_(
    params: list[Tensor],
    grads: list[Tensor],
    momenta: list[Tensor],
    coefficients: NovoGradCoefficients,
    *,
    lr: float | Tensor,
    settings: NovoGradSettings,
    maximize: bool = False,
) -> None:
    """Change momenta and parameters in place, tensor by tensor.

    Args:
        params: Parameters [w].
        grads: Gradients [g], of the shapes of ``params``; left as they are.
        momenta: Momentum buffers [m], of the shapes of ``params``; zeros before the first step.
        coefficients: See :func:`novograd_coefficients_`.
        lr: Step size [λ].
        settings: See :class:`NovoGradSettings`.
        maximize: Ascend instead of descend.
    """
    sign = -1.0 if maximize else 1.0
    for index, (param, grad, momentum) in enumerate(zip(params, grads, momenta, strict=True)):
        decay, step = coefficients.decay, coefficients.step
        momentum.mul_(settings.beta1)
        if isinstance(decay, Tensor):
            momentum.addcmul_(param, decay[index])
        elif decay:
            momentum.add_(param, alpha=decay)
        # A factor that is a tensor stays on the device; as `alpha` it would be read back to the host.
        momentum.addcmul_(grad, coefficients.gradient[index], value=sign)
        if step is None and not isinstance(lr, Tensor):
            param.add_(momentum, alpha=-lr)
        else:
            scale = torch.as_tensor(lr if step is None else lr * step[index])
            param.addcmul_(momentum, scale, value=-1.0)


def novograd_foreach_(
    params: list[Tensor],
    grads: list[Tensor],
    momenta: list[Tensor],
    coefficients: NovoGradCoefficients,
    *,
    lr: float | Tensor,
    settings: NovoGradSettings,
    maximize: bool = False,
) -> None:
    """Make the step of :func:`novograd_for_loop_` on whole lists: the same operations in the same order.

    The tensors of a list are of one device and dtype.
    """
    num, decay, step = len(params), coefficients.decay, coefficients.step
    torch._foreach_mul_(momenta, settings.beta1)
    if isinstance(decay, Tensor):
        torch._foreach_addcmul_(momenta, params, list(decay.unbind()))
    elif decay:
        torch._foreach_add_(momenta, params, alpha=decay)
    gains = list(coefficients.gradient.unbind())
    torch._foreach_addcmul_(momenta, grads, gains, -1.0 if maximize else 1.0)
    if step is None and not isinstance(lr, Tensor):
        torch._foreach_add_(params, momenta, alpha=-lr)
    else:
        scales = [torch.as_tensor(lr)] * num if step is None else list((lr * step).unbind())
        torch._foreach_addcmul_(params, momenta, scales, -1.0)


def novograd_fused_(
    params: list[Tensor],
    grads: list[Tensor],
    momenta: list[Tensor],
    coefficients: NovoGradCoefficients,
    *,
    lr: float | Tensor,
    settings: NovoGradSettings,
    maximize: bool = False,
) -> None:
    """Make the step of :func:`novograd_for_loop_` by torch's fused kernel of SGD with momentum, for β₁ > 0.

    On the CPU the kernel runs tensor by tensor, with :math:`1 - a` as dampening and :math:`b/a` as weight decay. Small
    tensors of equal shapes go through it together, with copies of their gradients, times a. Other devices, which must
    not be waited for, see :func:`novograd_fused_without_waiting_`.

    Ask :func:`fused_novograd_works` first: the kernel is private API.
    """
    if params[0].device.type != "cpu":
        novograd_fused_without_waiting_(
            params, grads, momenta, coefficients, lr=lr, settings=settings, maximize=maximize
        )
        return
    others = list(range(len(params)))
    # Where the coefficients are more precise than the gradients, scaled copies would lose what the kernel keeps.
    if settings.uniform and coefficients.gradient.dtype == grads[0].dtype:
        portions, others = small_by_shape(grads)
        for places in portions:
            _fused_on_copies_(
                places, (params, grads, momenta), coefficients, lr, settings, maximize
            )
    _fused_one_by_one_(others, (params, grads, momenta), coefficients, lr, settings.beta1, maximize)


def novograd_fused_without_waiting_(
    params: list[Tensor],
    grads: list[Tensor],
    momenta: list[Tensor],
    coefficients: NovoGradCoefficients,
    *,
    lr: float | Tensor,
    settings: NovoGradSettings,
    maximize: bool = False,
) -> None:
    """Make the step of :func:`novograd_fused_` in one call of the kernel; the settings must be uniform.

    The gradients enter the momenta beforehand, divided by β₁, which the kernel multiplies with. In their place the
    kernel gets the parameters, times b.
    """
    # Then the kernel has only the decay to add, whose gradient is the parameter: each element is read before it is
    # written.
    gains = list((coefficients.gradient / settings.beta1).unbind())
    torch._foreach_addcmul_(momenta, grads, gains, -1.0 if maximize else 1.0)
    torch._fused_sgd_(
        params,
        params,
        momenta,
        weight_decay=0.0,
        momentum=settings.beta1,
        lr=lr,
        dampening=1 - settings.weight_decay,
        nesterov=False,
        maximize=False,
        is_first_step=False,
    )


def _fused_on_copies_(
    places: list[int],
    lists: Lists,
    coefficients: NovoGradCoefficients,
    lr: float | Tensor,
    settings: NovoGradSettings,
    maximize: bool,
) -> None:
    """Make the step of some tensors of one shape in one call of the kernel."""
    params, grads, momenta = ([tensors[place] for place in places] for tensors in lists)
    # Scaled by a already, so that one gain fits all tensors of the call.
    copies = stack_scaled(grads, coefficients.gradient[torch.tensor(places)])
    _fused_sgd_(params, copies, momenta, 1.0, settings.weight_decay, lr, settings.beta1, maximize)


def _fused_one_by_one_(
    places: list[int],
    lists: Lists,
    coefficients: NovoGradCoefficients,
    lr: float | Tensor,
    beta1: float,
    maximize: bool,
) -> None:
    params, grads, momenta = lists
    # Free on a CPU; on other devices it would wait, which is why they take another way.
    gains = coefficients.gradient.tolist()
    decays = _numbers(coefficients.decay, len(params))
    steps = _numbers(1.0 if coefficients.step is None else coefficients.step, len(params))
    for i in places:
        param, grad, a = params[i], grads[i], gains[i]
        if a < _SMALLEST_GAIN:
            grad, a = grad * a, 1.0
        _fused_sgd_([param], [grad], [momenta[i]], a, decays[i], lr * steps[i], beta1, maximize)


def _numbers(value: float | Tensor, num: int) -> list[float]:
    numbers: list[float] = value.tolist() if isinstance(value, Tensor) else [value] * num
    return numbers


def _fused_sgd_(
    params: list[Tensor],
    grads: list[Tensor],
    momenta: list[Tensor],
    gain: float,
    decay: float,
    lr: float | Tensor,
    beta1: float,
    maximize: bool,
) -> None:
    """Make the step m ← β₁m + gain·g + decay·w, w ← w − lr·m."""
    torch._fused_sgd_(
        params,
        grads,
        momenta,
        # The kernel weighs the decayed gradient with 1 − dampening, so the decay must be divided by that weight.
        weight_decay=decay / gain,
        momentum=beta1,
        lr=lr,
        dampening=1 - gain,
        nesterov=False,
        maximize=maximize,
        # A first step would copy the gradient into the momentum without dampening; ours starts from zeros instead.
        is_first_step=False,
    )


@cache
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # torch has no annotations here
def fused_novograd_works(device_type: str, dtype: torch.dtype) -> bool:
    """Return whether torch's kernel, here and now, makes the step that is asked of it.

    The answer is found by one step of which the result is known: w = 1, g = 2, m = ½ with β₁ = ½, a = ¼, b = λ = ⅛
    leads to m = ⅞ and w = 57/64, and multiples of these to multiples.

    Args:
        device_type: For example ``"cpu"`` or ``"cuda"``.
        dtype: Floating-point type of parameters, gradients and momenta.
    """
    one = powers_of_two(device_type, dtype)
    param, grad, momentum = one.clone(), one * 2, one / 2
    step = partial(
        _fused_sgd_, [param], [grad], [momentum], 0.25, 0.125, 0.125, 0.5, maximize=False
    )
    return runs(step) and torch.equal(momentum, one * 0.875) and torch.equal(param, one * 0.890625)
