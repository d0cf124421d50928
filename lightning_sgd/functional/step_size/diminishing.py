r"""Diminishing step sizes for strongly convex objectives, and what is proved for them.

With an objective that is :math:`\mu`-strongly convex, :math:`L`-smooth for every sample, and an offset :math:`E`, the
step after :math:`t` updates is

.. math::
    \eta_t = \frac{\alpha}{\mu\,(t + E)} \qquad\text{or}\qquad
    \eta_t = \frac{\alpha}{2\mu\,2^h}, \quad 2^h \le t + E < 2^{h+1} .

The second form needs no shared counter: a process that sees every P-th update only has to know when to halve. It
lies between α/2 and α times 1/(μ(t + E)).

No assumption on the size of gradients is made; the noise enters as :math:`N = 2\,E\|\nabla f(w_*;\xi)\|^2`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias

from lightning_sgd._validation import expect, expect_one_of

Theorem: TypeAlias = Literal["serial", "hogwild", "hogwild_nonconvex"]
"""Theorem 2 (no delay), 5 (delayed reads, convex samples), 6 (delayed reads, samples need not be convex)."""
StepForm: TypeAlias = Literal["smooth", "doubling"]

# Theorems 5 and 6 ask for 4 ≤ α_t at every step; Theorem 2 is about α = 2 alone.
SMALLEST_ALPHA = 4.0


@dataclass(frozen=True, slots=True)
class DiminishingSteps:
    """A sequence of step sizes, and the conditions under which it is covered.

    Attributes:
        mu: Strong convexity of the objective [μ].
        L: Smoothness of the objective for each sample [L].
        alpha: Numerator [α].
        offset: What is added to the number of updates [E].
        form: Smooth, or constant between powers of two.
        theorem: Which theorem is to cover it.
        num_filters: Parts into which the support of a gradient is split [D].
        max_delay: Number of updates that a read may miss [τ].
        num_processes: Processes that update the same parameters [P].
    """

    mu: float
    L: float
    alpha: float
    offset: float
    form: StepForm = "smooth"
    theorem: Theorem = "serial"
    num_filters: int = 1
    max_delay: int = 0
    num_processes: int = 1

    def at(self, num_updates: float) -> float:
        """Return the step size after so many updates.

        Args:
            num_updates: Updates so far, over all processes [t].

        Example:
            >>> steps = diminishing_steps(mu=0.1, L=1.0)
            >>> steps.at(0), steps.at(40)
            (0.5, 0.25)
        """
        time = num_updates + self.offset
        if self.form == "doubling":
            # frexp is exact where log2 rounds: the power of two at or below.
            return self.alpha / (2 * self.mu * math.ldexp(1.0, math.frexp(time)[1] - 1))
        return self.alpha / (self.mu * time)

    def violations(self) -> Iterator[str]:
        """Yield a sentence for each condition of the theorem that does not hold."""
        if self.theorem == "serial":
            yield from self._violations_of_theorem_2()
        elif (smallest := self.alpha / self._spread) < SMALLEST_ALPHA:
            yield (
                f"Theorem {self._number} needs 4 ≤ α_t at every step, and `alpha` = {self.alpha:g} gives "
                f"{smallest:g}; set `alpha` to {SMALLEST_ALPHA * self._spread:g} or more."
            )
        if self.theorem != "serial" and self.max_delay < self.num_processes - 1:
            yield (
                f"Theorem {self._number} needs `max_delay` to be a bound: {self.num_processes} processes miss "
                f"{self.num_processes - 1} updates even in step; set it to what you measure."
            )
        needed = required_offset(
            self.mu, self.L, self.alpha, self.theorem, self.num_filters, self.max_delay
        )
        # The slack lets an offset pass that a user computed by the same formula in another order.
        if self.offset < needed * (1 - 1e-12):
            yield (
                f"Theorem {self._number} needs `offset` ≥ {needed:g} here, got {self.offset:g}: "
                f"the first steps are too long; leave `offset` out."
            )

    def _violations_of_theorem_2(self) -> Iterator[str]:
        # Steps of 1/t with another factor still converge by Theorem 1, but it gives no rate.
        if self.alpha != 2:
            yield (
                f"Theorem 2 is about `alpha` = 2, got {self.alpha:g}, for which only convergence without a rate "
                "is known (Theorem 1); leave `alpha` out."
            )
        if self.form != "smooth":
            yield "Theorem 2 is about the smooth form; set `theorem` to hogwild for the doubling form."
        given = {
            name: getattr(self, name) for name in ("max_delay", "num_filters", "num_processes")
        }
        for name, value in given.items():
            if value > (0 if name == "max_delay" else 1):
                yield f"Theorem 2 is about SGD alone, got `{name}` = {value}; set `theorem` to hogwild."

    @property
    def _spread(self) -> float:
        """Between α and the smallest α_t."""
        return 2.0 if self.form == "doubling" else 1.0

    @property
    def _number(self) -> int:
        return {"serial": 2, "hogwild": 5, "hogwild_nonconvex": 6}[self.theorem]


def required_offset(
    mu: float, L: float, alpha: float, theorem: Theorem, num_filters: int = 1, max_delay: int = 0
) -> float:
    r"""Compute the smallest offset that a theorem covers.

    .. math:: E = \frac{2\alpha L}{\mu} \text{ (2)}, \qquad
        \max\Bigl(2\tau, \frac{4 L\alpha D}{\mu}\Bigr) \text{ (5)}, \qquad
        \max\Bigl(2\tau, \frac{4 L\kappa\alpha D}{\mu}\Bigr),\ \kappa = \frac L\mu \text{ (6)}

    Args:
        mu: Strong convexity of the objective [μ].
        L: Smoothness of the objective for each sample [L].
        alpha: Numerator of the step size [α].
        theorem: Which theorem.
        num_filters: Parts into which the support of a gradient is split [D].
        max_delay: Number of updates that a read may miss [τ].

    Example:
        >>> required_offset(0.125, 1.0, 4.0, "hogwild", max_delay=10)
        128.0
        >>> required_offset(0.125, 1.0, 4.0, "hogwild", max_delay=100)
        200
    """
    if theorem == "serial":
        return 2 * alpha * L / mu
    condition = L / mu if theorem == "hogwild_nonconvex" else 1.0
    return max(2 * max_delay, 4 * L * condition * alpha * num_filters / mu)


def diminishing_steps(
    mu: float,
    L: float,
    *,
    alpha: float | None = None,
    offset: float | None = None,
    form: StepForm = "smooth",
    theorem: Theorem = "serial",
    num_filters: int = 1,
    max_delay: int = 0,
    num_processes: int = 1,
) -> DiminishingSteps:
    """Build the sequence with the smallest α and E that the theorem covers, where these are not given.

    Args:
        mu: Strong convexity of the objective [μ].
        L: Smoothness of the objective for each sample [L].
        alpha: Numerator [α].
        offset: What is added to the number of updates [E].
        form: Smooth, or constant between powers of two.
        theorem: Which theorem.
        num_filters: Parts into which the support of a gradient is split [D].
        max_delay: Number of updates that a read may miss [τ].
        num_processes: Processes that update the same parameters [P].

    Raises:
        ValueError: If an argument is out of range.
    """
    _check_problem(mu, L)
    expect_one_of(form, StepForm, "form", "The default is smooth.")
    expect_one_of(theorem, Theorem, "theorem", "The default is serial.")
    if alpha is None:
        # The doubling form lies between α/2 and α, so it takes α = 8 to keep α_t ≥ 4.
        alpha = SMALLEST_ALPHA * (2 if form == "doubling" else 1) if theorem != "serial" else 2.0
    expect(math.isfinite(alpha) and alpha > 0, "alpha", "a positive number", alpha, "Leave it out.")
    counts = {
        "num_filters": (num_filters, 1),
        "max_delay": (max_delay, 0),
        "num_processes": (num_processes, 1),
    }
    for name, (value, least) in counts.items():
        expect(value >= least, name, f"at least {least}", value, f"The default is {least}.")
    if offset is None:
        offset = required_offset(mu, L, alpha, theorem, num_filters, max_delay)
    expect(
        math.isfinite(offset) and offset > 0, "offset", "a positive number", offset, "Leave it out."
    )
    counted = (num_filters, max_delay, num_processes)
    return DiminishingSteps(mu, L, alpha, offset, form, theorem, *counted)


def diminishing_bound(
    num_updates: int, mu: float, L: float, noise: float, initial_sq_distance: float
) -> float:
    r"""Bound, by Theorem 2, how far serial SGD with :class:`~lightning_sgd.DiminishingLR` can be from the optimum.

    .. math::
        E\|w_t - w_*\|^2 \le \frac{16 N}{\mu^2\,(t - T + E)} \quad\text{for } t \ge T, \qquad
        E = \frac{4L}\mu, \quad T = E\,\max\Bigl(\frac{L\mu}{N}\|w_0 - w_*\|^2,\, 1\Bigr) - E .

    Args:
        num_updates: Number of updates [t].
        mu: Strong convexity of the objective [μ].
        L: Smoothness of the objective for each sample [L].
        noise: Twice the mean squared norm of a sample's gradient at the optimum [N].
        initial_sq_distance: Squared distance from the optimum in the beginning.

    Returns:
        The bound; infinity as long as t < T, where nothing is promised.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> round(diminishing_bound(1000, mu=0.1, L=1.0, noise=0.5, initial_sq_distance=4.0), 4)
        0.7692
    """
    _check_problem(mu, L)
    expect(num_updates >= 0, "num_updates", "at least 0", num_updates, "Count optimizer steps.")
    for name, value in (("noise", noise), ("initial_sq_distance", initial_sq_distance)):
        expect(0 <= value < math.inf, name, "a number ≥ 0", value, "It is a mean of squares.")
    # 2αL/μ for the α = 2 of Theorem 2.
    offset = 4 * L / mu
    # Written without a division by the noise, which may be zero.
    start = max(4 * L**2 * initial_sq_distance - offset * noise, 0.0)
    if start > num_updates * noise:
        return math.inf
    return 16 * noise / (mu**2 * (num_updates + offset - start / (noise or 1.0)))


def _check_problem(mu: float, L: float) -> None:
    expect(
        math.isfinite(mu) and mu > 0,
        "mu",
        "a positive number",
        mu,
        "Weight decay is a safe value for a convex loss.",
    )
    expect(
        math.isfinite(L) and mu <= L,
        "L",
        f"a number that is not below mu = {mu:g}",
        L,
        "The smoothness includes the weight decay.",
    )
