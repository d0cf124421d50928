r"""Worst-case bound on one step of SGD whose gradient carries an error.

The step is :math:`x_{k+1} = x_k - \alpha (u_k + e_k)`, where :math:`u_k` is the gradient of one of the functions whose
mean is minimised and :math:`\|e_k\|^2 \le \delta^2 \|u_k\|^2 + c^2`; the error may be adversarial. With
:math:`\xi = x - x_*`, everything that is assumed about the functions is

.. math::
    \langle \xi, E u\rangle \ge m\|\xi\|^2, \qquad
    E\|u\|^2 \le M_{11}\|\xi\|^2 + 2 M_{21} \langle \xi, E u\rangle + 2 G^2 .

Weighing these two and the bound on the error with :math:`\nu, \lambda, \zeta \ge 0` proves
:math:`E\|\xi_{k+1}\|^2 \le \rho^2 \|\xi_k\|^2 + 2\lambda G^2 + \zeta c^2` whenever

.. math::
    \begin{pmatrix}
    1 - \rho^2 - 2m\nu + \lambda M_{11} & -\alpha + \nu + \lambda M_{21} & -\alpha \\
    \cdot & \alpha^2 - \lambda + \zeta\delta^2 & \alpha^2 \\
    \cdot & \cdot & \alpha^2 - \zeta
    \end{pmatrix} \preceq 0 .

The best weights solve a semidefinite programme. Here they are had without a solver. Eliminating the error by a Schur
complement leaves

.. math::
    \zeta = \alpha^2 \frac{s}{s-1}, \quad \lambda = \alpha^2 s\Bigl(1 + \frac{\delta^2}{s-1}\Bigr), \quad
    \nu = \alpha s - \lambda M_{21}, \quad \rho^2 = s - 2m\nu + \lambda M_{11}

with one free number s > 1; its best value gives :math:`(\sqrt A + \sqrt B)^2`, where

.. math::
    A = (1 - 2m\alpha + \tilde M\alpha^2) U + 2\alpha^2 G^2, \quad
    B = \alpha^2 (\delta^2 (\tilde M U + 2G^2) + c^2), \quad \tilde M = M_{11} + 2 m M_{21} .

Where that makes ν negative, ν is 0, λ grows by :math:`w = g\sqrt{U / ((M_{11} + M_{21}^2) U + 2G^2)}` with
:math:`g = \lambda M_{21} - \alpha s`, and s is searched for.

Everything is in Python floats: α² of a small step underflows in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

from lightning_sgd._validation import expect, expect_one_of, is_finite_at_least

Assumption: TypeAlias = Literal["smooth", "convex", "strongly_convex", "shifted"]
Branch: TypeAlias = Literal["closed_form", "searched"]


LARGEST_EXCESS = 1e12
"""Where only the error moves the parameters, s would have to be infinite."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BiasedSGDProblem:
    r"""Assumptions about an objective, a mean of functions :math:`f_i`, one of which makes a step.

    ================ ============================================== ======= ======= ================
    ``assumption``   about every :math:`f_i`                        M11     M21     G2
    ================ ============================================== ======= ======= ================
    smooth           L-smooth                                       2L²     0       E‖∇f_i(x*)‖²
    convex           convex and L-smooth                            0       L       E‖∇f_i(x*)‖²
    strongly_convex  m-strongly convex and L-smooth                 −2mL    L + m   E‖∇f_i(x*)‖²
    shifted          ‖∇f_i(x) − m·x‖ ≤ β, as hinge loss with decay  −m²     m       β² + m²‖x*‖²
    ================ ============================================== ======= ======= ================

    Mini-batches count as :math:`f_i` too: they keep L, and G2 falls like one over their size.

    Args:
        m: Strong convexity of the mean; weight decay is a safe value for convex losses.
        L: Smoothness of each function, decay included; not used by ``shifted``.
        assumption: What each function is.
        G2: Mean squared norm of a function's gradient at the optimum; 0 only if every function is minimal there.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> BiasedSGDProblem(m=0.1, L=1.0, assumption="convex", G2=0.5).m21
        1.0
    """

    m: float
    L: float | None = None
    assumption: Assumption = "strongly_convex"
    G2: float

    def __post_init__(self) -> None:
        expect(
            math.isfinite(self.m) and self.m > 0,
            "m",
            "a positive number",
            self.m,
            "Without strong convexity use GradientErrorMonitor alone: no step size can be certified.",
        )
        remedy = "Convex losses with weight decay are strongly_convex."
        expect_one_of(self.assumption, Assumption, "assumption", remedy)
        expect(
            self.assumption == "shifted" or (self.L is not None and self.m <= self.L < math.inf),
            "L",
            f"a number that is not below m = {self.m:g}",
            self.L,
            "The smoothness includes the weight decay.",
        )
        expect(is_finite_at_least(self.G2, 0), "G2", "a number ≥ 0", self.G2, "Measure it.")

    @property
    def m11(self) -> float:
        """Weight of the squared distance in the bound on the squared gradient."""
        L = self.L or 0.0
        return {
            # Each row splits ‖u‖² ≤ 2‖u − ∇f_i(x*)‖² + 2‖∇f_i(x*)‖², then smoothness or co-coercivity bounds the first
            # term; "shifted" splits u − mξ, which is at most β + m‖x*‖ long, instead.
            "smooth": 2 * L**2,
            "convex": 0.0,
            "strongly_convex": -2 * self.m * L,
            "shifted": -(self.m**2),
        }[self.assumption]

    @property
    def m21(self) -> float:
        """Half the weight of the inner product in the bound on the squared gradient."""
        L = self.L or 0.0
        return {"smooth": 0.0, "convex": L, "strongly_convex": L + self.m, "shifted": self.m}[
            self.assumption
        ]

    @property
    def m_tilde(self) -> float:
        """M11 + 2·m·M21 [M̃], never below m²."""
        return self.m11 + 2 * self.m * self.m21

    def squared_gradient(self, U: float) -> float:
        """Bound the mean squared gradient at mean squared distance U, as the closed form does [P].

        Args:
            U: Mean squared distance from the optimum.
        """
        return self.m_tilde * U + 2 * self.G2


@dataclass(frozen=True, slots=True)
class StepBound:
    """Bound on the distance after one step, with the weights that prove it.

    Attributes:
        U_next: Bound on the mean squared distance after the step.
        rho2: Factor of the squared distance before the step [ρ²].
        nu: Weight of strong convexity [ν].
        lam: Weight of the bound on the squared gradient [λ].
        zeta: Weight of the bound on the error [ζ]; infinite where there is no error.
        branch: Whether the closed form held, or one number had to be searched for.
    """

    U_next: float
    rho2: float
    nu: float
    lam: float
    zeta: float
    branch: Branch


def biased_sgd_step_bound(
    problem: BiasedSGDProblem, alpha: float, U: float, delta: float = 0.0, c: float = 0.0
) -> StepBound:
    """Compute the smallest bound on the squared distance after one step that the assumptions prove.

    Args:
        problem: What is known about the objective.
        alpha: Step size [α].
        U: Bound on the mean squared distance before the step.
        delta: Relative error of the gradient [δ].
        c: Absolute error of the gradient.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> problem = BiasedSGDProblem(m=1.0, L=10.0, G2=1.0)
        >>> round(biased_sgd_step_bound(problem, alpha=0.01, U=1.0, delta=0.1, c=0.2).U_next, 8)
        0.98600914
    """
    check_error(U, delta, c)
    expect(is_finite_at_least(alpha, 0), "alpha", "a number ≥ 0", alpha, "Use 0 for no step.")
    step = Step(problem, alpha, U, delta, c)
    if alpha == 0:
        return StepBound(U, 1.0, 0.0, 0.0, 0.0, "closed_form")
    excess = step.best_excess
    # ν ≥ 0: the best s of the unconstrained problem is allowed, and its value is known.
    if step.slope(excess) >= 0:
        bound = (math.sqrt(step.exact) + math.sqrt(step.added)) ** 2
        return step.bound(excess, bound, "closed_form")
    # Over the logarithm, because the best s − 1 may lie anywhere between 1e-9 and 1e9. Without an error s is 1.
    if step.added > 0:
        excess = math.exp(golden(lambda x: step.value(math.exp(x)), *step.bracket(excess)))
    return step.bound(excess, step.value(excess), "searched")


@dataclass(frozen=True, slots=True)
class Step:
    """The candidates among which the best proof of one step is searched: one for each s = 1 + excess."""

    problem: BiasedSGDProblem
    alpha: float
    U: float
    delta: float
    c: float

    @property
    def exact(self) -> float:
        """Squared distance after a step without error."""
        curvature = 1 - 2 * self.problem.m * self.alpha + self.problem.m_tilde * self.alpha**2
        # Never negative in exact arithmetic, because M̃ ≥ m²; the root of a rounded value must not fail.
        return max(curvature, 0.0) * self.U + 2 * self.alpha**2 * self.problem.G2

    @property
    def added(self) -> float:
        """Squared length of what the error adds."""
        P = self.problem.squared_gradient(self.U)
        return self.alpha**2 * (self.delta**2 * P + self.c**2)

    @property
    def best_excess(self) -> float:
        """The best s − 1 if ν may have any sign."""
        if self.added == 0:
            return 0.0
        return (
            min(math.sqrt(self.added / self.exact), LARGEST_EXCESS)
            if self.exact > 0
            else LARGEST_EXCESS
        )

    def lam(self, excess: float) -> float:
        """Return λ before it may have to grow."""
        stretch = self.delta**2 / excess if self.delta and excess else 0.0
        return self.alpha**2 * (1 + excess) * (1 + stretch)

    def slope(self, excess: float) -> float:
        """Return ν, which must not be negative."""
        return self.alpha * (1 + excess) - self.lam(excess) * self.problem.m21

    def value(self, excess: float) -> float:
        """Return the bound that this s proves."""
        problem, lam, nu = self.problem, self.lam(excess), self.slope(excess)
        total = self.U * (1 + excess + lam * problem.m11) + 2 * lam * problem.G2
        total += self._zeta(excess) * self.c**2 if self.c and excess else 0.0
        if nu >= 0:
            # ν < 0 is replaced by 0 and λ grows by w: w·growth + U·ν²/w is lowest at w = −ν·√(U/growth), which is put
            # in below.
            return total - 2 * problem.m * nu * self.U
        return total - 2 * nu * (problem.m21 * self.U + math.sqrt(self.U * self._growth))

    def bound(self, excess: float, value: float, branch: Branch) -> StepBound:
        """Return the bound with its weights."""
        problem, lam, nu = self.problem, self.lam(excess), self.slope(excess)
        s, zeta = 1 + excess, self._zeta(excess)
        if nu >= 0:
            rho2 = s - 2 * problem.m * nu + lam * problem.m11
            return StepBound(value, rho2, nu, lam, zeta, branch)
        # Without noise and curvature the best w is infinite; a large one is as good to eight digits.
        w = -nu * min(math.sqrt(self.U / self._growth) if self._growth > 0 else 1e8, 1e8)
        lam += w
        rho2 = (
            s + lam * problem.m11 + (lam * problem.m21 - self.alpha * s) ** 2 / w if w else math.inf
        )
        return StepBound(value, rho2, 0.0, lam, zeta, branch)

    def bracket(self, excess: float) -> tuple[float, float]:
        """Return the logarithms between which the best s − 1 lies if ν would be negative at ``excess``."""
        # ν = α·s·(1 − α·M21·(1 + δ²/(s − 1))): for α·M21 ≥ 1 it is negative for every s, so nothing limits the search.
        room = 1 - self.alpha * self.problem.m21
        if room <= 1e-9:
            return math.log(1e-9), math.log(1e9)
        # From here on ν ≥ 0, and before it ν grows with s.
        return math.log(excess), math.log(self.delta**2 * self.alpha * self.problem.m21 / room)

    @property
    def _growth(self) -> float:
        problem = self.problem
        return max(problem.m11 + problem.m21**2, 0.0) * self.U + 2 * problem.G2

    def _zeta(self, excess: float) -> float:
        return self.alpha**2 * (1 + excess) / excess if excess else math.inf


def golden(function: Callable[[float], float], low: float, high: float) -> float:
    """Find where a function with a single minimum is lowest, by golden-section search.

    Args:
        function: The function.
        low: Where to begin.
        high: Where to end.

    Example:
        >>> round(golden(lambda x: (x - 0.3) ** 2, 0.0, 1.0), 6)
        0.3
    """
    share = (math.sqrt(5) - 1) / 2
    x, y = high - share * (high - low), low + share * (high - low)
    at_x, at_y = function(x), function(y)
    while high - low > 1e-8 * max(abs(low), abs(high)):  # a valley is flat to twice as many digits
        if at_x <= at_y:
            high, y, at_y = y, x, at_x
            x = high - share * (high - low)
            at_x = function(x)
        else:
            low, x, at_x = x, y, at_y
            y = low + share * (high - low)
            at_y = function(y)
    return (low + high) / 2


def check_error(U: float, delta: float, c: float) -> None:
    """Refuse what is no squared distance or no error.

    Args:
        U: Mean squared distance from the optimum.
        delta: Relative error [δ].
        c: Absolute error.
    """
    expect(is_finite_at_least(U, 0), "U", "a number ≥ 0", U, "It is a mean of squares.")
    expect(is_finite_at_least(delta, 0), "delta", "a number ≥ 0", delta, "Use 0 for none.")
    expect(is_finite_at_least(c, 0), "c", "a number ≥ 0", c, "Use 0 for none.")
