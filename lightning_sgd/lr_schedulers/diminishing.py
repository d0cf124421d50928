"""Step sizes that fall like 1/t, as the theory of SGD without bounded gradients wants them."""

from __future__ import annotations

from dataclasses import asdict

from torch.optim import Optimizer

from lightning_sgd._validation import warn_outside_intended_use
from lightning_sgd.functional.step_size.diminishing import (
    DiminishingSteps,
    StepForm,
    Theorem,
    diminishing_steps,
)
from lightning_sgd.lr_schedulers._plain_sgd import differences_from_plain_sgd
from lightning_sgd.lr_schedulers._planned import PlannedLR


class DiminishingLR(PlannedLR):
    r"""Step sizes that fall like 1/t, long enough to forget the start and short enough to average the noise out.

    For an objective that is ``mu``-strongly convex [μ] and whose samples are ``L``-smooth [L], after :math:`t` updates,

    .. math::
        \eta_t = \frac{\alpha}{\mu\,(t + E)} \quad\text{(smooth)}, \qquad
        \eta_t = \frac{\alpha}{2\mu\,2^h},\ 2^h \le t + E < 2^{h+1} \quad\text{(doubling)},

    with ``alpha`` [α] and ``offset`` [E] chosen by ``theorem`` unless they are given:

    ==================== === ============================ ========================================================
    ``theorem``          α   E                            covers
    ==================== === ============================ ========================================================
    serial               2   2αL/μ                        Theorem 2: SGD, error ≤ 16N/μ² / t; the first step is 1/(2L)
    hogwild              4   max(2τ, 4LαD/μ)              Theorem 5: reads that miss up to τ updates, convex samples
    hogwild_nonconvex    4   max(2τ, 4LκαD/μ), κ = L/μ    Theorem 6: the same, samples need not be convex
    ==================== === ============================ ========================================================

    The doubling form has α = 8 and halves the step when t + E reaches a power of two, so that processes need no shared
    counter. A condition that is violated is told in a warning.

    The step is absolute: of the optimizer's ``lr`` only the ratio between parameter groups counts, and the group with
    the largest gets :math:`\eta_t`. A factor from another schedule in ``ChainedScheduler`` stays on it.

    Cost: none.

    Args:
        optimizer: The optimizer; the theorems are about plain SGD.
        mu: Strong convexity of the objective [μ]; the weight decay is a safe value for a convex loss.
        L: Smoothness of the objective for each sample [L], weight decay included.
        alpha: Numerator [α]; by default the smallest that the theorem covers.
        form: ``smooth``, or ``doubling`` for steps that are constant between powers of two.
        theorem: ``serial``, ``hogwild`` or ``hogwild_nonconvex``, see above.
        max_delay: Number of updates that a read of the parameters may miss [τ].
        num_filters: Parts into which the support of a gradient is split, one of which is written [D].
        num_processes: Processes that update the same parameters; each counts its own steps [P].
        offset: What is added to the number of updates [E]; by default the smallest that the theorem covers.
        num_steps_per_call: Optimizer steps between two calls of ``step``: 1 with ``interval: step``, the number of
            steps in an epoch with ``interval: epoch``.
        last_epoch: As in torch: the number of calls of ``step`` that lie behind.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))])
        >>> schedule = DiminishingLR(optimizer, mu=0.5, L=1.0)
        >>> for _ in range(4):
        ...     print(f"{schedule.get_last_lr()[0]:.3f}")
        ...     optimizer.step()
        ...     schedule.step()
        0.500
        0.444
        0.400
        0.364

    Reference:
        Lam M. Nguyen, Phuong Ha Nguyen, Marten van Dijk, Peter Richtárik, Katya Scheinberg, Martin Takáč. SGD and
        Hogwild! Convergence Without the Bounded Gradients Assumption. ICML 2018.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        mu: float,
        L: float,
        alpha: float | None = None,
        form: StepForm = "smooth",
        theorem: Theorem = "serial",
        max_delay: int = 0,
        num_filters: int = 1,
        num_processes: int = 1,
        offset: float | None = None,
        num_steps_per_call: int = 1,
        last_epoch: int = -1,
    ) -> None:
        steps = diminishing_steps(
            mu,
            L,
            alpha=alpha,
            offset=offset,
            form=form,
            theorem=theorem,
            num_filters=num_filters,
            max_delay=max_delay,
            num_processes=num_processes,
        )
        # A dictionary, because a checkpoint takes no object of ours.
        self._settings = asdict(steps)
        violations = [*steps.violations(), *differences_from_plain_sgd(optimizer)]
        if violations:
            warn_outside_intended_use(" ".join(violations))
        super().__init__(optimizer, num_steps_per_call, last_epoch)

    @property
    def steps(self) -> DiminishingSteps:
        """The sequence, with the α and E that are in use."""
        return DiminishingSteps(**self._settings)

    def plan(self) -> float:
        """Return the step size by the number of updates of all processes together."""
        steps = self.steps
        # Each process counts its own updates and takes the others to be as fast.
        return steps.at(self.last_epoch * self.num_steps_per_call * steps.num_processes)
