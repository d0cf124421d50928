"""TRSGD and TRAdam as ``torch.optim.Optimizer``."""

from __future__ import annotations

from torch import Tensor
from torch.optim.optimizer import ParamsT

from lightning_sgd._validation import expect, is_finite_at_least
from lightning_sgd.functional.optim.momentum_steps import (
    AdamSettings,
    adam_for_loop_,
    adam_foreach_,
    adam_fused_,
    fused_adam_works,
    fused_sgd_works,
    sgd_for_loop_,
    sgd_foreach_,
    sgd_fused_,
)
from lightning_sgd.functional.optim.tra import InnerDecay
from lightning_sgd.optimizers._base import Kernels, ParamGroup, check_betas
from lightning_sgd.optimizers._stages import Portion, StagedOptimizer
from lightning_sgd.optimizers._tensors import TensorType

_SGD_KERNELS = Kernels(sgd_for_loop_, sgd_foreach_, sgd_fused_, fused_sgd_works)
_ADAM_KERNELS = Kernels(adam_for_loop_, adam_foreach_, adam_fused_, fused_adam_works)


class TRSGD(StagedOptimizer):
    r"""SGD with momentum in stages, each with a pull towards its start and falling steps, for very small batches.

    A stage has ``inner_steps`` [S] steps, k = 0, …, S − 1. With ``lr`` [η], ``lambda_w`` [λ_w], ``momentum`` [μ],
    ``weight_decay`` [d] and a, the parameters w at the start of the stage,

    .. math::
        b &\leftarrow \mu\,b + g + \frac{2\lambda_w}{\eta}\,(w - a) + d\,w \\
        w &\leftarrow w - \frac{\eta}{k+1}\,b .

    The momentum b goes on from stage to stage. The average step size within a stage is 0.29 ``lr`` for S = 10: compare
    with plain SGD at such an ``lr`` before you credit the pull, see the card. ``inner_steps=1`` is SGD.

    Shapes: parameters of any shape, real floating-point, dense gradients.
    Cost: two buffers of the size of the parameters, momentum and anchor; one more pass for the pull, except in the
    first step of a stage.

    The pull is not clipped: clipping comes before it. After exchanging weights from outside call ``reset_stage()``.

    Args:
        params: Parameters or parameter groups; a group may set its own values of the arguments below.
        lr: Step size at the start of a stage [η].
        lambda_w: Strength of the pull per unit of ``lr`` [λ_w]; by default a tenth of the ``lr`` that is given here,
            for each group. With momentum 0.9 the pull is unstable from about 0.5 on.
        inner_steps: Steps of a stage [S].
        inner_lr_decay: ``harmonic`` divides the step size by k + 1 within a stage, ``none`` leaves it.
        momentum: Decay rate of the momentum [μ], in [0, 1).
        weight_decay: L2 penalty, added to the gradient [d].
        reset_momentum: Clear the momentum at the start of every stage.
        maximize: Ascend on the loss instead of descend.
        foreach: Use multi-tensor operations; by default only where the fused kernel is not available.
        fused: Use torch's fused SGD kernel; by default wherever it is available.

    Raises:
        ValueError: If an argument is out of range, or parameters are complex or gradients sparse.
        RuntimeError: If a step is captured in a CUDA graph.

    Example:
        >>> import torch
        >>> w = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> optimizer = TRSGD([w], lr=0.1)
        >>> for _ in range(5):
        ...     loss = (w**2).sum()
        ...     optimizer.zero_grad()
        ...     loss.backward()
        ...     _ = optimizer.step()
        ...     print(f"{loss.item():.3f}")
        5.000
        3.200
        1.997
        1.208
        0.702

    Reference:
        Yikai Zhang, Hui Qu, Chao Chen, Dimitris Metaxas. Taming the Noisy Gradient: Train Deep Neural Networks with
        Small Batch Sizes. IJCAI 2019.
    """

    state_names = ("momentum_buffer",)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.1,
        *,
        lambda_w: float | None = None,
        # The authors' code: 10 steps, momentum 0.9, coupled decay 1e-4, and a tenth of `lr` for the pull.
        inner_steps: int = 10,
        inner_lr_decay: InnerDecay = "harmonic",
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        reset_momentum: bool = False,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
    ) -> None:
        defaults: ParamGroup = {
            "lr": lr,
            "lambda_w": lambda_w,
            "inner_steps": inner_steps,
            "inner_lr_decay": inner_lr_decay,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "reset_momentum": reset_momentum,
            "maximize": maximize,
            "foreach": foreach,
            "fused": fused,
        }
        super().__init__(params, defaults)

    def check_group(self, group: ParamGroup) -> None:
        """Raise where a setting is out of range."""
        super().check_group(group)
        momentum = group["momentum"]
        expect(0 <= momentum < 1, "momentum", "in [0, 1)", momentum, "Try 0.9.")

    def update(self, group: ParamGroup, kind: TensorType, portion: Portion) -> None:
        """Make the step of SGD."""
        # The pull is in the gradients already, so kernels make a plain step of SGD.
        step = self.select_kernel(_SGD_KERNELS, group, kind)
        decay, momentum = group["weight_decay"], group["momentum"]
        step(*portion.tensors, lr=portion.lr, momentum=momentum, weight_decay=decay)


class TRAdam(StagedOptimizer):
    r"""Adam in stages, each with a pull towards its start and falling steps, for very small batches.

    A stage has ``inner_steps`` [S] steps, k = 0, …, S − 1. With ``lr`` [η], ``lambda_w`` [λ_w], ``betas`` [β₁, β₂],
    ``eps`` [ε], ``weight_decay`` [d] and a, the parameters w at the start of the stage,

    .. math::
        h &= g + \frac{2\lambda_w}{\eta}\,(w - a) + d\,w \\
        m &\leftarrow \beta_1 m + (1-\beta_1)\,h, \qquad v \leftarrow \beta_2 v + (1-\beta_2)\,h^2 \\
        w &\leftarrow w - \frac{\eta}{k+1}\,\frac{\sqrt{1-\beta_2^t}}{1-\beta_1^t}\,\frac{m}{\sqrt v+\epsilon} .

    The moments and t, the number of all steps, go on from stage to stage. ``inner_steps=1`` is Adam, up to the place of
    ε: ``torch.optim.Adam`` adds it after the correction of the bias.

    Shapes: parameters of any shape, real floating-point, dense gradients.
    Cost: three buffers of the size of the parameters, Adam's two and the anchor, one more with ``amsgrad``; one more
    pass for the pull, except in the first step of a stage.

    The pull is not clipped: clipping comes before it. After exchanging weights from outside call ``reset_stage()``.

    Args:
        params: Parameters or parameter groups; a group may set its own values of the arguments below.
        lr: Step size at the start of a stage [η].
        lambda_w: Strength of the pull per unit of ``lr`` [λ_w]; by default a tenth of the ``lr`` that is given here,
            for each group.
        inner_steps: Steps of a stage [S].
        inner_lr_decay: ``harmonic`` divides the step size by k + 1 within a stage, ``none`` leaves it.
        betas: Decay rates of the moments [β₁, β₂], each in [0, 1).
        eps: Added to the root of the second moments [ε].
        weight_decay: L2 penalty, added to the gradient [d].
        amsgrad: Divide by the root of the largest second moments so far.
        maximize: Ascend on the loss instead of descend.
        foreach: Use multi-tensor operations; by default only where the fused kernel is not available.
        fused: Use torch's fused Adam kernel; by default wherever it is available.

    Raises:
        ValueError: If an argument is out of range, or parameters are complex or gradients sparse.
        RuntimeError: If a step is captured in a CUDA graph.

    Example:
        >>> import torch
        >>> w = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> optimizer = TRAdam([w], lr=0.1)
        >>> for _ in range(5):
        ...     loss = (w**2).sum()
        ...     optimizer.zero_grad()
        ...     loss.backward()
        ...     _ = optimizer.step()
        ...     print(f"{loss.item():.3f}")
        5.000
        4.420
        4.146
        3.969
        3.839

    Reference:
        Yikai Zhang, Hui Qu, Chao Chen, Dimitris Metaxas. Taming the Noisy Gradient: Train Deep Neural Networks with
        Small Batch Sizes. IJCAI 2019.
    """

    state_names = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        *,
        lambda_w: float | None = None,
        inner_steps: int = 10,
        inner_lr_decay: InnerDecay = "harmonic",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-4,
        amsgrad: bool = False,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
    ) -> None:
        defaults: ParamGroup = {
            "lr": lr,
            "lambda_w": lambda_w,
            "inner_steps": inner_steps,
            "inner_lr_decay": inner_lr_decay,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "foreach": foreach,
            "fused": fused,
        }
        super().__init__(params, defaults)

    def check_group(self, group: ParamGroup) -> None:
        """Raise where a setting is out of range."""
        super().check_group(group)
        check_betas(group["betas"], "Try (0.9, 0.999).")
        expect(
            is_finite_at_least(group["eps"], 0), "eps", "a number ≥ 0", group["eps"], "Try 1e-8."
        )

    def update(self, group: ParamGroup, kind: TensorType, portion: Portion) -> None:
        """Make the step of Adam."""
        params, grads, averages, squares, *largest = portion.tensors
        beta1, beta2 = group["betas"]
        # Made anew in every step, because a schedule may change any setting of a group.
        settings = AdamSettings(beta1, beta2, group["eps"], group["weight_decay"])
        step = self.select_kernel(_ADAM_KERNELS, group, kind)
        step(
            params,
            grads,
            averages,
            squares,
            # Only with `amsgrad` a fifth list comes.
            largest[0] if largest else None,
            portion.steps,
            lr=portion.lr,
            settings=settings,
        )
