"""The bound of one step by a solver for semidefinite programmes: slow, and independent of the closed form."""

from __future__ import annotations

from lightning_sgd._validation import expect
from lightning_sgd.functional.step_size.biased_sgd import BiasedSGDProblem, check_error


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
