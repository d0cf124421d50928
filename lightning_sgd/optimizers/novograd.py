"""NovoGrad as a ``torch.optim.Optimizer``."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT, StateDict

from lightning_sgd._validation import (
    expect,
    expect_one_of,
    is_finite_at_least,
    warn_no_effect,
    warn_outside_intended_use,
)
from lightning_sgd.functional.optim.novograd import (
    NovoGradSettings,
    NovoGradVariant,
    fused_novograd_works,
    novograd_coefficients_,
    novograd_for_loop_,
    novograd_foreach_,
    novograd_fused_,
)
from lightning_sgd.optimizers._base import (
    GroupwiseOptimizer,
    Kernels,
    ParamGroup,
    check_betas,
    lr_on,
)
from lightning_sgd.optimizers._tensors import (
    TensorType,
    refuse_sharded,
    restore_scalar_states,
    scalar_buffer,
    tensors_by_type,
)

_KERNELS = Kernels(novograd_for_loop_, novograd_foreach_, novograd_fused_, fused_novograd_works)


class NovoGrad(GroupwiseOptimizer):
    r"""SGD with momentum on gradients that are normalised layer by layer.

    Every parameter tensor w, called a layer, keeps a momentum m of its shape and one number v. With its gradient
    g, ``lr`` [λ], ``betas`` [β₁, β₂], ``eps`` [ε] and ``weight_decay`` [d],

    .. math::
        v &\leftarrow \beta_2 v + (1-\beta_2)\,\|g\|^2, \qquad v \leftarrow \|g\|^2 \text{ in the first step} \\
        m &\leftarrow \beta_1 m + \Big(\frac{g}{\sqrt v+\epsilon} + d\,w\Big) \\
        w &\leftarrow w - \lambda m .

    The size of the gradients has no influence: a loss multiplied by a constant gives the same steps. A step moves a
    layer by at most :math:`\lambda/((1-\beta_1)\sqrt{1-\beta_2})`, whatever its number of weights, and by
    :math:`\lambda/(1-\beta_1)`, 20 ``lr`` by default, along a constant gradient. Step sizes are therefore not
    those of Adam, and the effective decay per step is 20 ``lr * weight_decay``.

    Shapes: parameters of any shape, real floating-point, dense gradients, not sharded.
    Cost: one buffer of the size of the parameters and one number per tensor, half of what Adam keeps; one more pass
    over the gradients than SGD with momentum. Numbers are kept in float32 for parameters of half precision.

    Args:
        params: Parameters or parameter groups; a group may set its own values of the arguments below.
        lr: Step size [λ].
        betas: Decay rates of momentum and second moments [β₁, β₂], each in [0, 1).
        eps: Added to the root of the second moment [ε].
        weight_decay: Decay [d], added to the normalised gradient; 0.001 is usual, and none for biases and norms.
        grad_averaging: Weigh what enters the momentum with 1 − β₁, as Adam does, from the second step on.
        amsgrad: Divide by the root of the largest second moment so far.
        decoupled_weight_decay: Shrink the parameters by ``lr * weight_decay`` instead of adding to the momentum.
        variant: ``paper``; ``openseq2seq`` for ε inside the root and averaging from the first step on; ``apex`` for a
            momentum of the raw gradients that is normalised when it is used, bias corrections and decoupled decay.
        maximize: Ascend instead of descend.
        foreach: Use multi-tensor operations; by default only where the fused kernel is not available.
        fused: Use torch's fused SGD kernel; by default wherever it is available on the CPU.

    Raises:
        ValueError: If an argument is out of range, or parameters are complex or sharded or gradients sparse.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> optimizer = NovoGrad([w], lr=0.1)
        >>> for _ in range(5):
        ...     loss = (w**2).sum()
        ...     optimizer.zero_grad()
        ...     loss.backward()
        ...     _ = optimizer.step()
        ...     print(f"{loss.item():.3f}")
        5.000
        4.563
        3.785
        2.813
        1.813

    Reference:
        Boris Ginsburg and others. Training Deep Networks with Stochastic Gradient Normalized by Layerwise Adaptive
        Second Moments. arXiv 1905.11286, 2020.
    """

    state_names = ("momentum_buffer",)
    suggested_lr = "Try 0.01."

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.01,
        # Of OpenSeq2Seq, the code of the paper's authors; other packages have other defaults.
        betas: tuple[float, float] = (0.95, 0.98),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        grad_averaging: bool = False,
        amsgrad: bool = False,
        decoupled_weight_decay: bool = False,
        variant: NovoGradVariant = "paper",
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
    ) -> None:
        defaults: ParamGroup = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "grad_averaging": grad_averaging,
            "amsgrad": amsgrad,
            "decoupled_weight_decay": decoupled_weight_decay,
            "variant": variant,
            "maximize": maximize,
            "foreach": foreach,
            "fused": fused,
        }
        super().__init__(params, defaults)

    def check_params(self, params: list[Tensor]) -> None:
        """Raise where the update rule is not defined for a parameter."""
        super().check_params(params)
        refuse_sharded(params, "NovoGrad")

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Continue from a saved state, the second moments with all their digits.

        Args:
            state_dict: What ``state_dict`` of an optimizer gave.
        """
        super().load_state_dict(state_dict)
        restore_scalar_states(self, state_dict, "second_moment", "max_second_moment", "step")

    def step_group(self, group: ParamGroup) -> None:
        """Make the step of one parameter group."""
        # The form of apex keeps a momentum of raw gradients, so decay cannot be inside of it.
        decoupled = group["decoupled_weight_decay"] or group["variant"] == "apex"
        decay = group["weight_decay"]
        beta1, beta2 = group["betas"]
        # Made anew in every step, because a schedule may change any setting of a group.
        settings = NovoGradSettings(
            beta1=beta1,
            beta2=beta2,
            eps=group["eps"],
            weight_decay=0.0 if decoupled else decay,
            grad_averaging=group["grad_averaging"],
            variant=group["variant"],
        )
        for kind, tensors in tensors_by_type(self, group, "momentum_buffer").items():
            params, grads, momenta = tensors
            lr = lr_on(kind.device, group["lr"])
            if decoupled and decay:
                # Before the step and apart from it, as AdamW does.
                torch._foreach_mul_(params, 1 - lr * decay)
            coefficients = novograd_coefficients_(
                grads,
                scalar_buffer(self, params, "second_moment"),
                scalar_buffer(self, params, "max_second_moment") if group["amsgrad"] else None,
                # The other forms correct no bias, and so need no count.
                self._count(params) if group["variant"] == "apex" else None,
                settings,
            )
            step = self.select_kernel(_KERNELS, group, kind, _obstacle(kind, settings))
            step(
                params,
                grads,
                momenta,
                coefficients,
                lr=lr,
                settings=settings,
                maximize=group["maximize"],
            )

    def _count(self, params: list[Tensor]) -> Tensor:
        return scalar_buffer(self, params, "step").add_(1)

    def check_group(self, group: ParamGroup) -> None:
        """Raise where a setting is out of range, warn where it does nothing."""
        super().check_group(group)
        check_betas(group["betas"], "Try (0.95, 0.98).")
        expect(
            is_finite_at_least(group["eps"], 0), "eps", "a number ≥ 0", group["eps"], "Try 1e-8."
        )
        _check_variant(group)
        if group["decoupled_weight_decay"] and group["weight_decay"] == 0:
            warn_no_effect("`decoupled_weight_decay` has no effect while `weight_decay` is 0.")


def _obstacle(kind: TensorType, settings: NovoGradSettings) -> str | None:
    """Return why the fused kernel cannot make the step with these settings."""
    if kind.device.type != "cpu" and not settings.uniform:
        # Coefficients that differ from tensor to tensor would have to be read on the host, which waits for the device.
        return "available for these settings outside the CPU"
    # torch's kernel writes no buffer without momentum, and the one call for all tensors divides by β₁.
    return None if settings.beta1 > 0 else "made for β₁ = 0"


def _check_variant(group: ParamGroup) -> None:
    expect_one_of(group["variant"], NovoGradVariant, "variant", "Leave it at 'paper'.")
    if group["variant"] != "apex":
        return
    expect(
        not group["amsgrad"],
        "amsgrad",
        "False beside `variant='apex'`",
        True,
        "Use 'paper' or 'openseq2seq'.",
    )
    if group["decoupled_weight_decay"]:
        warn_no_effect("`decoupled_weight_decay` has no effect: decay is always decoupled in apex.")
    if not group["grad_averaging"]:
        warn_outside_intended_use(
            "`variant='apex'` corrects the bias of an average, and `grad_averaging` is off: the first steps are "
            "1/(1 − β₁) times as long as the gradients ask for. Set `grad_averaging: true`, apex's own default."
        )
