"""MaSS as a ``torch.optim.Optimizer``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lightning_sgd._validation import (
    Words,
    expect,
    is_finite_at_least,
    plain_number,
    warn_no_effect,
    warn_outside_intended_use,
)
from lightning_sgd.functional.optim.mass import (
    fused_mass_works,
    mass_coefficients,
    mass_for_loop_,
    mass_foreach_,
    mass_fused_,
    mass_parameters_from_steps,
)
from lightning_sgd.functional.optim.mass_theory import mass_hyperparameters
from lightning_sgd.optimizers._base import GroupwiseOptimizer, Kernels, ParamGroup, lr_on
from lightning_sgd.optimizers._tensors import tensors_by_type

_KERNELS = Kernels(mass_for_loop_, mass_foreach_, mass_fused_, fused_mass_works)


class MaSS(GroupwiseOptimizer):
    r"""Nesterov SGD with a compensation term that keeps it stable at SGD's step size.

    With the gradient :math:`g_t` taken at the parameters :math:`u_t`, and ``lr`` [η1], ``alpha`` [α],
    ``kappa_tilde`` [κ̃],

    .. math::
        w_{t+1} &= u_t - \eta_1 g_t \\
        u_{t+1} &= (1+\gamma)\, w_{t+1} - \gamma\, w_t + \eta_2 g_t, \\
        \gamma &= \frac{1-\alpha}{1+\alpha}, \qquad
        \eta_2 = \eta_1\,\frac{1 - 1/\tilde\kappa}{1+\alpha} .

    ``kappa_tilde=1`` is Nesterov SGD with momentum γ, ``kappa_tilde=1/alpha`` is plain SGD; useful values lie between.
    The parameters hold u, so evaluation and checkpoints see u; :meth:`swap_to_w` evaluates at w.

    Shapes: parameters of any shape, real floating-point, dense gradients.
    Cost: one buffer of the size of the parameters, no extra pass; one fused kernel per step where torch has it.

    When ``lr`` follows a schedule the momentum is kept in units of the gradient, as in ``torch.optim.SGD``; a
    secondary step size given as ``eta2`` scales along with ``lr``. ``OneCycleLR`` and ``CyclicLR`` need
    ``cycle_momentum: false``: the acceleration is given by ``alpha``, which they do not know.

    Args:
        params: Parameters or parameter groups; a group may set its own values of the arguments below.
        lr: Step size [η1], about half of the largest step size at which plain SGD is stable.
        alpha: Inverse time scale of the acceleration [α], in (0, 1]; smaller means more momentum.
        kappa_tilde: Statistical condition number [κ̃], from 1 (Nesterov) to 1/alpha (plain SGD).
        gamma: Acceleration [γ] in [0, 1); with ``eta2`` it replaces ``alpha`` and ``kappa_tilde``.
        eta2: Secondary step size [η2] at step size ``lr``; with ``gamma`` it replaces ``alpha`` and ``kappa_tilde``.
        weight_decay: L2 penalty, added to the gradient and so to the compensation too.
        decoupled_weight_decay: Shrink the parameters by ``lr * weight_decay`` instead of adding to the gradient.
        restart_on_lr_drop: Clear the buffer whenever ``lr`` falls, as the authors' code does; ``lr`` must be a float.
        maximize: Ascend instead of descend.
        foreach: Use multi-tensor operations; by default only where the fused kernel is not available.
        fused: Use torch's fused SGD kernel; by default wherever it is available.
        differentiable: Let autograd run through ``step``; then neither ``foreach`` nor ``fused`` is used.

    Raises:
        ValueError: If an argument is out of range, or parameters are complex or gradients sparse.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> optimizer = MaSS([w], lr=0.1)
        >>> for _ in range(5):
        ...     loss = (w**2).sum()
        ...     optimizer.zero_grad()
        ...     loss.backward()
        ...     _ = optimizer.step()
        ...     print(f"{loss.item():.3f}")
        5.000
        2.551
        0.936
        0.168
        0.001

    Reference:
        Chaoyue Liu, Mikhail Belkin. Accelerating SGD with momentum for over-parameterized learning. ICLR 2020.
    """

    state_names = ("momentum_buffer",)
    suggested_lr = "Try 0.1."

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.1,
        # The authors' class has κ̃ = 12, which is nearly plain SGD; their script for ResNet-32 has 2.
        alpha: float = 0.05,
        kappa_tilde: float = 2.0,
        *,
        gamma: float | None = None,
        eta2: float | None = None,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = False,
        restart_on_lr_drop: bool = False,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        differentiable: bool = False,
    ) -> None:
        defaults: ParamGroup = {
            "lr": lr,
            "alpha": alpha,
            "kappa_tilde": kappa_tilde,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
            "restart_on_lr_drop": restart_on_lr_drop,
            "maximize": maximize,
            "foreach": foreach,
            "fused": fused,
            "differentiable": differentiable,
        }
        gamma, eta2 = plain_number(gamma), plain_number(eta2)
        if gamma is not None or eta2 is not None:
            if (alpha, kappa_tilde) != (0.05, 2.0):
                warn_no_effect(
                    "`alpha` and `kappa_tilde` have no effect beside `gamma` and `eta2`."
                )
            _replace_steps(defaults, gamma, eta2)
        super().__init__(params, defaults)

    @classmethod
    def from_spectrum(
        cls,
        params: ParamsT,
        *,
        L: float,
        L1: float,
        mu: float,
        kappa_tilde: float,
        batch_size: int,
        **settings: Any,
    ) -> MaSS:
        """Build MaSS with the hyper-parameters that are optimal for a spectrum and a batch size.

        Args:
            params: Parameters or parameter groups.
            L: Largest eigenvalue of the Hessian [L].
            L1: Smallest number with E[‖x‖²xxᵀ] ⪯ L1·H [L₁].
            mu: Smallest non-zero eigenvalue of the Hessian [μ].
            kappa_tilde: Statistical condition number for single samples [κ̃].
            batch_size: Samples behind one step, over all ranks and accumulated batches [m]; see
                :func:`~lightning_sgd.effective_batch_size`.
            **settings: Further arguments of :class:`MaSS`.

        Example:
            >>> w = torch.nn.Parameter(torch.zeros(2))
            >>> optimizer = MaSS.from_spectrum([w], L=1.0, L1=6.0, mu=0.01, kappa_tilde=6.0, batch_size=4)
            >>> round(optimizer.defaults["lr"], 4)
            0.4444
        """
        best = mass_hyperparameters(L, L1, mu, kappa_tilde, batch_size)
        return cls(
            params, lr=best.eta1, alpha=best.alpha, kappa_tilde=best.kappa_tilde_m, **settings
        )

    def add_param_group(self, param_group: ParamGroup) -> None:
        """Add a group, which may set any of the constructor's arguments for itself."""
        super().add_param_group(param_group)
        # A scheduler has changed `lr` by the time `swap_to_w` or a restart asks for the one of the last step.
        self.param_groups[-1].setdefault("last_lr", None)

    def complete_group(self, group: ParamGroup) -> ParamGroup:
        """Replace ``gamma`` and ``eta2`` by the ``alpha`` and ``kappa_tilde`` that mean the same."""
        if "gamma" in group or "eta2" in group:
            # η2 is given in units of the parameters, so it has a meaning beside a step size only.
            group.setdefault("lr", self.defaults["lr"])
            _replace_steps(group, group.pop("gamma", None), group.pop("eta2", None))
        return group

    def step_group(self, group: ParamGroup) -> None:
        """Make the step of one parameter group."""
        # The authors restart with v = u at every drop, which is a momentum of zero.
        if group["restart_on_lr_drop"] and group["lr"] < (group["last_lr"] or 0.0):
            self._restart(group)
        coefficients = mass_coefficients(group["alpha"], group["kappa_tilde"])
        # torch's kernel writes no buffer without momentum.
        obstacle = None if coefficients.gamma > 0 else "made for γ = 0"
        decay, decoupled = group["weight_decay"], group["decoupled_weight_decay"]
        for kind, tensors in tensors_by_type(self, group, "momentum_buffer").items():
            params, grads, buffers = tensors
            lr = lr_on(kind.device, group["lr"])
            if decoupled and decay:
                # Before the step and apart from it, as AdamW does: the compensation must not see the decay.
                torch._foreach_mul_(params, 1 - lr * decay)
            step = self.select_kernel(_KERNELS, group, kind, obstacle)
            step(
                params,
                grads,
                buffers,
                lr=lr,
                coefficients=coefficients,
                weight_decay=0.0 if decoupled else decay,
                maximize=group["maximize"],
            )
            # A copy, because schedulers write into a tensor in place.
            group["last_lr"] = lr.detach().clone() if isinstance(lr, Tensor) else lr

    def _restart(self, group: ParamGroup) -> None:
        for param in group["params"]:
            if param in self.state:
                self.state[param]["momentum_buffer"].zero_()

    def check_group(self, group: ParamGroup) -> None:
        """Raise where a setting is out of range, warn where it does nothing."""
        super().check_group(group)
        alpha, kappa_tilde = group["alpha"], group["kappa_tilde"]
        expect(
            not (isinstance(group["lr"], Tensor) and group["restart_on_lr_drop"]),
            "lr",
            "a float when `restart_on_lr_drop` is set",
            Words("a tensor"),
            "Comparing tensors would wait for the device at every step.",
        )
        expect(0 < alpha <= 1, "alpha", "in (0, 1]", alpha, "Try 0.05.")
        fits = is_finite_at_least(kappa_tilde, 1)
        expect(fits, "kappa_tilde", "at least 1", kappa_tilde, "Try 2.")
        # The slack lets `kappa_tilde=1/alpha`, plain SGD, pass although the quotient is rounded.
        if kappa_tilde > (1 / alpha) * (1 + 1e-9):
            warn_outside_intended_use(
                f"`kappa_tilde` = {kappa_tilde:g} exceeds 1/alpha = {1 / alpha:g}: the momentum becomes negative "
                "and MaSS slower than plain SGD. Use a value between 1 and 1/alpha."
            )
        if group["decoupled_weight_decay"] and group["weight_decay"] == 0:
            warn_no_effect("`decoupled_weight_decay` has no effect while `weight_decay` is 0.")
        if group["differentiable"] and (group["foreach"] or group["fused"]):
            warn_no_effect("`foreach` and `fused` have no effect while `differentiable` is set.")

    @contextmanager
    def swap_to_w(self) -> Iterator[None]:
        r"""Let the parameters hold w inside a ``with`` block, and u again, bit by bit, after it.

        The parameters are u, where gradients are taken. The other sequence is w = u + lr·b, the end point of the last
        plain gradient step. Costs one copy of the parameters for as long as the block lasts.

        Example:
            >>> w = torch.nn.Parameter(torch.tensor([1.0]))
            >>> optimizer = MaSS([w], lr=0.1, gamma=0.5, eta2=0.02)
            >>> (w**2).sum().backward()
            >>> optimizer.step()
            >>> with optimizer.swap_to_w():
            ...     print(f"{w.item():.2f}")
            0.80
            >>> print(f"{w.item():.2f}")
            0.74
        """
        kept: list[tuple[Tensor, Tensor]] = []
        try:
            with torch.no_grad():
                for param, w in self._iterates_w():
                    # Kept before it is changed: whatever fails in between, the way back is complete. A copy, since u +
                    # x − x is not u.
                    kept.append((param, param.clone()))
                    param.copy_(w)
            yield
        finally:
            with torch.no_grad():
                for param, u in kept:
                    param.copy_(u)

    def _iterates_w(self) -> Iterator[tuple[Tensor, Tensor]]:
        for group in self.param_groups:
            scale = mass_coefficients(group["alpha"], group["kappa_tilde"]).scale
            for param in group["params"]:
                if param in self.state:
                    lr = group["last_lr"]
                    lr = lr.to(param.device) if isinstance(lr, Tensor) else lr
                    yield param, param + self.state[param]["momentum_buffer"] * (lr * scale)


def _replace_steps(group: ParamGroup, gamma: float | None, eta2: float | None) -> None:
    """Write (gamma, eta2) into a group as the (alpha, kappa_tilde) that mean the same."""
    if gamma is None or eta2 is None:
        missing, given = ("gamma", "eta2") if gamma is None else ("eta2", "gamma")
        expect(False, missing, f"given together with `{given}`", None, "Give both or neither.")
        return
    group["alpha"], group["kappa_tilde"] = mass_parameters_from_steps(
        gamma, eta2, float(group["lr"])
    )
