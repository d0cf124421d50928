"""Samples of symmetric stable laws, by the method of Chambers, Mallows and Stuck."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_sgd._validation import expect


def sample_stable(
    alpha: float,
    shape: int | tuple[int, ...],
    scale: float = 1.0,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    r"""Independent samples of the symmetric α-stable law with characteristic function :math:`e^{-|st|^\alpha}`.

    .. math::
        \frac{\sin\alpha U}{(\cos U)^{1/\alpha}} \Big(\frac{\cos((1-\alpha)U)}{W}\Big)^{(1-\alpha)/\alpha}, \qquad
        U \sim \mathrm{Uniform}(-\tfrac\pi2, \tfrac\pi2),\; W \sim \mathrm{Exponential}(1)

    α = 2 is Gaussian with variance 2s², α = 1 is Cauchy.

    Args:
        alpha: Index of the law [α], in (0, 2].
        shape: Shape of the tensor.
        scale: Scale of the law [s].
        generator: Where the random numbers come from; by default torch's global generator.
        dtype: Type of the result; computed in float64.

    Raises:
        ValueError: If ``alpha`` or ``scale`` is out of range.

    Example:
        >>> sample_stable(1.5, (2, 3), generator=torch.Generator().manual_seed(0)).shape
        torch.Size([2, 3])

    Reference:
        J. M. Chambers, C. L. Mallows, B. W. Stuck. A Method for Simulating Stable Random Variables. Journal of the
        American Statistical Association 71, 1976.
    """
    expect(0 < alpha <= 2, "alpha", "in (0, 2]", alpha, "2 is Gaussian, 1 is Cauchy.")
    expect(0 < scale < math.inf, "scale", "a positive number", scale, "The default is 1.")
    device = "cpu" if generator is None else generator.device
    uniform = torch.rand(shape, generator=generator, dtype=torch.float64, device=device)
    U = (uniform - 0.5) * math.pi
    if alpha == 1:
        return (scale * U.tan()).to(dtype)
    W = torch.empty_like(U).exponential_(generator=generator)
    power = ((1 - alpha) * U).cos().div(W).pow((1 - alpha) / alpha)
    return (scale * (alpha * U).sin() / U.cos().pow(1 / alpha) * power).to(dtype)
