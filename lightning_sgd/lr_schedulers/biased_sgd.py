"""Step sizes that are optimal for gradients with a known error."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any, Protocol

from torch.optim import Optimizer

from lightning_sgd._validation import expect, is_finite_at_least, warn_outside_intended_use
from lightning_sgd.functional.step_size.biased_sgd import (
    BiasedSGDProblem,
    biased_sgd_step_bound,
    check_error,
)
from lightning_sgd.functional.step_size.biased_sgd_plan import (
    LARGEST,
    biased_sgd_floor,
    closed_form_step,
    max_relative_error,
    optimal_step,
)
from lightning_sgd.lr_schedulers._plain_sgd import differences_from_plain_sgd
from lightning_sgd.lr_schedulers._planned import PlannedLR

REUSED_FOR = 1e-3
"""Relative change of the bound for which a step size that took a search is kept."""


class SupportsErrorModel(Protocol):
    """A source of measured errors of gradients: :class:`~lightning_sgd.GradientErrorMonitor`."""

    def error_model(self) -> tuple[float, float] | None:
        """Return the pair (δ, c); ``None`` before anything was measured."""


class BiasedSGDLR(PlannedLR):
    r"""The step size that is certain to lead closest to the optimum when gradients are compressed, rounded or inexact.

    The gradient :math:`u_k` carries an error with :math:`\|e_k\|^2 \le \delta^2\|u_k\|^2 + c^2`, maybe an adversarial
    one. For the bound :math:`U_k` on the mean squared distance from the optimum, beginning with ``U0``,

    .. math::
        P = \tilde M U_k + 2G^2, \quad q^2 = \delta^2 P + c^2, \quad
        \alpha_k = \frac1P \Bigl(mU_k - q\sqrt{\frac{U_k(P - m^2U_k)}{P - q^2}}\Bigr), \quad
        U_{k+1} = (\sqrt A + \sqrt B)^2 ,

    where the closed form holds; elsewhere :func:`~lightning_sgd.optimal_step` searches. Without an error the steps fall
    like 1/(mk). With one they fall to **zero**: below :func:`~lightning_sgd.biased_sgd_floor` no step is certain to
    help, and a warning says so once. A constant step often does help there, because real errors are not adversarial.

    The step is absolute: of the optimizer's ``lr`` only the ratio between parameter groups counts, and the group with
    the largest gets the planned step, with which the bound is followed. The bound is for plain SGD. In
    ``ChainedScheduler`` put it first: it takes the step size that it finds for the one that was used.

    Cost: some microseconds per step, some milliseconds where a search is needed.

    Args:
        optimizer: The optimizer, plain SGD.
        problem: What is known about the objective: ``m``, ``L``, ``assumption`` and ``G2``.
        U0: Squared distance from the optimum in the beginning, rather too large than too small.
        delta: Relative error of the gradients [δ].
        c: Absolute error of the gradients.
        min_lr: Smallest step size; above zero the training goes on where nothing is certain any more.
        max_lr: Largest step size; by default 1/(2·M21), or m/M̃ for merely smooth functions.
        monitor: Measures ``delta`` and ``c`` while training goes on, from its first measurement on; only in Python.
        num_steps_per_call: Optimizer steps between two calls of ``step``: 1 with ``interval: step``, the number of
            steps in an epoch with ``interval: epoch``.
        last_epoch: As in torch: the number of calls of ``step`` that lie behind.

    Attributes:
        U: Bound on the mean squared distance from the optimum now.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> import torch
        >>> from lightning_sgd import BiasedSGDProblem
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))])
        >>> problem = BiasedSGDProblem(m=0.1, L=1.0, G2=0.01)
        >>> schedule = BiasedSGDLR(optimizer, problem, U0=1.0, delta=0.01)
        >>> for _ in range(3):
        ...     print(f"{schedule.get_last_lr()[0]:.4f} {schedule.U:.4f}")
        ...     optimizer.step()
        ...     schedule.step()
        0.4545 1.0000
        0.4545 0.9191
        0.4545 0.8451

    Reference:
        Bin Hu, Peter Seiler, Laurent Lessard. Analysis of Biased Stochastic Gradient Descent Using Sequential
        Semidefinite Programs. Mathematical Programming 187, 2021.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        problem: BiasedSGDProblem,
        U0: float,
        delta: float = 0.0,
        c: float = 0.0,
        min_lr: float = 0.0,
        max_lr: float | None = None,
        monitor: SupportsErrorModel | None = None,
        num_steps_per_call: int = 1,
        last_epoch: int = -1,
    ) -> None:
        expect(math.isfinite(U0) and U0 > 0, "U0", "a positive number", U0, "Take ‖x0‖² plus some.")
        check_error(U0, delta, c)
        expect(is_finite_at_least(min_lr, 0), "min_lr", "a number ≥ 0", min_lr, "Try 0.")
        if max_lr is None:
            # Half of 1/M21, up to which the bound holds in closed form for exact gradients.
            max_lr = max(min_lr, 0.5 / problem.m21 if problem.m21 else problem.m / problem.m_tilde)
        expect(max_lr > 0, "max_lr", "a positive number", max_lr, "Leave it out.")
        expect(max_lr >= min_lr, "max_lr", f"at least min_lr = {min_lr:g}", max_lr, "Raise it.")
        for sentence in differences_from_plain_sgd(optimizer):
            warn_outside_intended_use(sentence)
        # A dictionary, because a checkpoint takes no object of ours.
        self._problem = asdict(problem)
        self.U0, self.U, self.delta, self.c = U0, U0, delta, c
        self.min_lr, self.max_lr, self.monitor = min_lr, max_lr, monitor
        # A list of numbers, because a checkpoint takes no object of ours.
        self._searched: list[float] = []
        self._has_begun, self._has_warned = False, False
        super().__init__(optimizer, num_steps_per_call, last_epoch)

    @property
    def problem(self) -> BiasedSGDProblem:
        """The assumptions about the objective."""
        return BiasedSGDProblem(**self._problem)

    def begin(self) -> None:
        """Start from ``U0``, and make the planned steps up to a place that is jumped to."""
        self.U, self._searched, self._has_begun = self.U0, [], False
        # The error that was measured on the way is not known any more; the present one stands for it.
        for _ in range(self.last_epoch):
            self._follow(self._choose())

    def plan(self) -> float:
        """Follow the bound by the step size that was used, ask the monitor, and choose."""
        if self._has_begun:
            # Read back, not remembered: a limit or a second schedule may have changed what was planned.
            used = max(float(group["lr"]) for group in self.optimizer.param_groups)
            for _ in range(self._num_calls_due):
                self._follow(used)
        self._has_begun = True
        measured = None if self.monitor is None else self.monitor.error_model()
        if measured is not None and measured != (self.delta, self.c):
            # A step size that was searched for another error is not the best one any more.
            (self.delta, self.c), self._searched = measured, []
        return self._choose()

    def state_dict(self) -> dict[str, Any]:
        """Return bound, error and settings; the monitor keeps its own state."""
        return {key: value for key, value in super().state_dict().items() if key != "monitor"}

    def _follow(self, used: float) -> None:
        for _ in range(self.num_steps_per_call):
            after = biased_sgd_step_bound(self.problem, used, self.U, self.delta, self.c).U_next
            # Finite, because an infinite bound would stay infinite after the error has fallen.
            self.U = min(after, LARGEST)

    def _choose(self) -> float:
        alpha = closed_form_step(self.problem, self.U, self.delta, self.c)
        if alpha is None:
            alpha = self._search()
        if alpha == 0:
            self._warn_once()
        return min(max(alpha, self.min_lr), self.max_lr)

    def _search(self) -> float:
        if not self._searched or abs(self.U / self._searched[0] - 1) > REUSED_FOR:
            best = optimal_step(self.problem, self.U, self.delta, self.c)
            self._searched = [self.U, best]
        return self._searched[1]

    def _warn_once(self) -> None:
        if self._has_warned:
            return
        self._has_warned = True
        floor = biased_sgd_floor(self.problem, self.delta, self.c)
        budget = max_relative_error(self.problem, self.U, self.c)
        rest = f"steps stay at `min_lr` = {self.min_lr:g}" if self.min_lr else "the parameters stay"
        warn_outside_intended_use(
            f"No step size is certain to lead closer than U = {self.U:.4g} to the optimum: with delta = "
            f"{self.delta:.4g} and c = {self.c:.4g} the floor is {floor:.4g}, and progress from here needs delta < "
            f"{budget:.4g}. From now on {rest}. Compress less, or set `min_lr` to go on without a guarantee."
        )
