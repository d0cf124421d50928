r"""Step sizes that are optimal for a known error of the gradient, and what no step size can reach.

For small steps the bound of :mod:`~lightning_sgd.functional.step_size.biased_sgd` falls at the rate

.. math::
    \frac{1}{U}\frac{dU_{k+1}}{d\alpha} = \min_{\sigma \ge \delta^2 M_{21}}\ \sigma - 2m + \frac1\sigma \Bigl(
        \delta^2\bigl(\tilde M + \tfrac{2G^2}{U}\bigr) + \tfrac{c^2}{U}\Bigr),

with s = 1 + σα. Below that limit of σ the weight of strong convexity is zero, and the rate is
:math:`\sigma - 2a + (\delta^2a^2 + c^2/U)/\sigma` with
:math:`a = M_{21} + \sqrt{M_{11} + M_{21}^2 + 2G^2/U}`: negative only for δ < 1, where its lowest point lies above the
limit. The bound is convex in the step size, so progress is certain if and only if the rate is negative. That is a
quadratic condition on U and on δ², and gives floor and budget.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from lightning_sgd._validation import expect, is_finite_at_least
from lightning_sgd.functional.step_size.biased_sgd import (
    BiasedSGDProblem,
    Step,
    biased_sgd_step_bound,
    check_error,
    golden,
)

LARGEST = 1e150
"""A bound beyond this says nothing, and its square would overflow."""


def biased_sgd_bound(
    problem: BiasedSGDProblem,
    alphas: Iterable[float],
    U0: float,
    delta: float = 0.0,
    c: float = 0.0,
) -> list[float]:
    """Bound the mean squared distance from the optimum after each step of a schedule; infinite once it overflows.

    Args:
        problem: What is known about the objective.
        alphas: Step sizes, one per step [α].
        U0: Squared distance in the beginning.
        delta: Relative error of the gradients [δ].
        c: Absolute error of the gradients.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> problem = BiasedSGDProblem(m=1.0, L=10.0, G2=1.0)
        >>> [round(U, 4) for U in biased_sgd_bound(problem, [0.01, 0.01], U0=1.0, delta=0.1, c=0.2)]
        [0.986, 0.9722]
    """
    bounds, U = [], U0
    for alpha in alphas:
        # Once infinite, always infinite: the bound of a step grows with the bound before it.
        if math.inf > U:
            U = biased_sgd_step_bound(problem, alpha, U, delta, c).U_next
            U = U if U < LARGEST else math.inf
        bounds.append(U)
    return bounds


def closed_form_step(
    problem: BiasedSGDProblem, U: float, delta: float = 0.0, c: float = 0.0
) -> float | None:
    """Return the best step size where the closed form holds; ``None`` where it has to be searched for.

    Args:
        problem: What is known about the objective.
        U: Bound on the mean squared distance.
        delta: Relative error of the gradient [δ].
        c: Absolute error of the gradient.
    """
    P = problem.squared_gradient(U)
    q2 = delta**2 * P + c**2
    if U == 0 or q2 >= problem.m**2 * U:
        return 0.0
    # P ≥ m²U, and rounding must not make it less; in two factors, because U³ may overflow.
    rest = max(P - problem.m**2 * U, 0.0)
    y = math.sqrt(q2) * math.sqrt(U * rest / (P - q2)) if q2 else 0.0
    alpha = max((problem.m * U - y) / P, 0.0)
    step = Step(problem, alpha, U, delta, c)
    return alpha if alpha == 0 or step.slope(step.best_excess) >= 0 else None


def optimal_step(problem: BiasedSGDProblem, U: float, delta: float = 0.0, c: float = 0.0) -> float:
    r"""Return the step size with the smallest bound on the squared distance after the step.

    With :math:`P = \tilde M U + 2G^2` and :math:`q^2 = \delta^2 P + c^2`, where the closed form holds,

    .. math:: \alpha_* = \frac1P \Bigl(mU - q\sqrt{\frac{U(P - m^2U)}{P - q^2}}\Bigr),

    and zero when :math:`q^2 \ge m^2 U`: then no step is certain to lead closer. Elsewhere it is searched for in
    [0, 1/M21], some milliseconds.

    Args:
        problem: What is known about the objective.
        U: Bound on the mean squared distance.
        delta: Relative error of the gradient [δ].
        c: Absolute error of the gradient.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> problem = BiasedSGDProblem(m=1.0, assumption="shifted", G2=1.0)
        >>> round(optimal_step(problem, U=1.0, delta=0.05, c=0.1), 8)
        0.29722374
        >>> optimal_step(problem, U=0.01, delta=0.05, c=0.1)
        0.0
    """
    check_error(U, delta, c)
    alpha = closed_form_step(problem, U, delta, c)
    if alpha is not None:
        return alpha

    def bound(alpha: float) -> float:
        return biased_sgd_step_bound(problem, alpha, U, delta, c).U_next

    # M21 > 0 here: for M21 = 0 the weight ν is never negative and the closed form holds. Beyond 1/M21 no s makes ν ≥ 0.
    found = golden(bound, 0.0, 1 / problem.m21)
    # A gain in the last digits is rounding, not progress.
    return found if bound(found) < U * (1 - 1e-12) else 0.0


def biased_sgd_floor(problem: BiasedSGDProblem, delta: float = 0.0, c: float = 0.0) -> float:
    r"""Compute the mean squared distance below which no step size is certain to lead.

    .. math::
        U_\infty = \frac{c^2 + 2\delta^2 G^2}{\sigma(2m - \sigma) - \tilde M\delta^2}, \qquad
        \sigma = \max(m, \delta^2 M_{21}) ,

    which for small errors is :math:`(c^2 + 2\delta^2 G^2) / (m^2 - \tilde M\delta^2)`.

    Args:
        problem: What is known about the objective.
        delta: Relative error of the gradients [δ].
        c: Absolute error of the gradients.

    Returns:
        The floor; infinity if the error is too large for any progress to be certain.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> problem = BiasedSGDProblem(m=1.0, L=10.0, G2=1.0)
        >>> round(biased_sgd_floor(problem, delta=0.1), 6), round(biased_sgd_floor(problem, delta=0.4), 6)
        (0.020408, 3.125)
    """
    check_error(1.0, delta, c)
    # With σ = m alone, the formula for small errors, the floor would come out too low: ν would be negative.
    sigma = max(problem.m, delta**2 * problem.m21)
    room = sigma * (2 * problem.m - sigma) - problem.m_tilde * delta**2
    return (c**2 + 2 * delta**2 * problem.G2) / room if room > 0 else math.inf


def max_relative_error(problem: BiasedSGDProblem, U: float | None = None, c: float = 0.0) -> float:
    r"""Compute the budget: the largest relative error with which progress is still certain.

    .. math::
        \delta_{\max}^2 = \frac{m^2U - c^2}{\tilde M U + 2G^2}
        \quad\text{if that is at most } \frac{m}{M_{21}}, \qquad
        \delta_{\max}^2 = \frac{-b + \sqrt{b^2 - 4 M_{21}^2 U c^2}}{2 M_{21}^2 U}, \ b = M_{11}U + 2G^2
        \quad\text{otherwise.}

    Args:
        problem: What is known about the objective.
        U: Mean squared distance from which progress is wanted; by default from any distance, however large.
        c: Absolute error of the gradients.

    Returns:
        The budget; zero if the absolute error alone is too large.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> problem = BiasedSGDProblem(m=1.0, L=10.0, assumption="convex", G2=1.0)
        >>> round(max_relative_error(problem), 4), round(max_relative_error(problem, U=0.1), 4)
        (0.2236, 0.1581)
    """
    expect(
        U is None or is_finite_at_least(U, 0), "U", "a number ≥ 0", U, "It is a mean of squares."
    )
    check_error(1.0, 0.0, c)
    # Divided by such a U, noise and error would overflow; and nothing is left to gain.
    if U is not None and U < 1 / LARGEST:
        return 0.0
    # Per unit of U, so that the limit of large distances is a case like the others.
    noise, error = (0.0, 0.0) if U is None else (2 * problem.G2 / U, c**2 / U)
    m, m21 = problem.m, problem.m21
    squared = (m**2 - error) / (problem.m_tilde + noise)
    if squared * m21 > m:
        b = problem.m11 + noise
        squared = (-b + math.sqrt(max(b**2 - 4 * m21**2 * error, 0.0))) / (2 * m21**2)
    return math.sqrt(max(squared, 0.0))


def biased_sgd_sdp(
    problem: BiasedSGDProblem, alpha: float, U: float, delta: float = 0.0, c: float = 0.0
) -> float:
    """Certify the bound of one step with a solver; a tenth of a second.

    Training never needs it: the closed form behind :func:`~lightning_sgd.biased_sgd_bound` is the same number. It is
    here for those who want to see that, or to start from it for other assumptions.

    Args:
        problem: What is known about the objective.
        alpha: Step size [α], positive.
        U: Bound on the mean squared distance before the step.
        delta: Relative error of the gradient [δ].
        c: Absolute error of the gradient.

    Returns:
        The smallest bound on the mean squared distance after the step.

    Raises:
        ValueError: If an argument is out of range.
        ModuleNotFoundError: If cvxpy is missing; the extra ``certify`` brings it.
        RuntimeError: If the solver finds no solution.
    """
    check_error(U, delta, c)
    expect(alpha > 0, "alpha", "a positive number", alpha, "No step changes nothing.")
    try:
        import cvxpy as cp
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "biased_sgd_sdp needs cvxpy: pip install 'lightning-sgd[certify]'."
        ) from error
    # In units of α, or the solver loses the digits of a small step.
    rho2, nu, lam, zeta = cp.Variable(), cp.Variable(), cp.Variable(), cp.Variable()
    corner = 1 - rho2 - 2 * problem.m * alpha * nu + alpha**2 * problem.m11 * lam
    side = -1 + nu + alpha * problem.m21 * lam
    lmi = cp.bmat([[corner, side, -1], [side, 1 - lam + delta**2 * zeta, 1], [-1, 1, 1 - zeta]])
    total = rho2 * U + alpha**2 * (2 * problem.G2 * lam + c**2 * zeta)
    constraints = [lmi << 0, rho2 >= 0, nu >= 0, lam >= 0, zeta >= 0]
    programme = cp.Problem(cp.Minimize(total), constraints)
    programme.solve(solver=cp.CLARABEL)
    if programme.value is None:
        raise RuntimeError(f"The solver found no solution: {programme.status}.")
    return float(programme.value)
