"""Other estimators of a tail index, and samples of stable laws to try them on.

Estimators by the largest samples (Hill, Pickands, DEDH) find the exponent of any power law, but for a stable law only
if few enough samples are taken, and nothing sensible for Gaussian ones. Those by quantiles and by the characteristic
function suppose a symmetric stable law. None of them sees dependence between samples.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from lightning_sgd._validation import expect

# Computed with SciPy for symmetric laws instead of copied from the published table.
_QUANTILE_RATIOS = {
    2.0: 2.4387,
    1.9: 2.5128,
    1.8: 2.6099,
    1.7: 2.7394,
    1.6: 2.9140,
    1.5: 3.1498,
    1.4: 3.4656,
    1.3: 3.8865,
    1.2: 4.4509,
    1.1: 5.2229,
    1.0: 6.3138,
    0.9: 7.9285,
    0.8: 10.479,
}
"""(q₉₅ − q₀₅)/(q₇₅ − q₂₅) of symmetric stable laws, for each α."""


def hill_tail_index(samples: Tensor, num_largest: int) -> float:
    r"""Compute Hill's estimator: :math:`k / \sum_{i\le k} \ln(X_{(i)}/X_{(k+1)})` with magnitudes in descending order.

    For a stable law near α = 2 it is far too high unless k is tiny, because the power law begins far out.

    Args:
        samples: The samples, in any order.
        num_largest: How many of the largest magnitudes to use [k].

    Returns:
        The index; infinite if the magnitudes are equal, NaN if a sample is not finite.

    Raises:
        ValueError: If there are not k + 1 samples that are not zero.

    Example:
        >>> round(hill_tail_index(torch.tensor([8.0, -4.0, 2.0, 1.0]), 2), 4)  # 2 / (ln 4 + ln 2)
        0.9618
    """
    gamma = float(_log_excesses(samples, num_largest).mean())
    return 1 / gamma if gamma else math.inf


def pickands_tail_index(samples: Tensor, num_largest: int) -> float:
    r"""Compute Pickands' estimator from the magnitudes of ranks k, 2k and 4k; noisy, negative for light tails.

    .. math:: \ln 2 \Big/ \ln\frac{X_{(k)} - X_{(2k)}}{X_{(2k)} - X_{(4k)}}

    Args:
        samples: The samples, in any order.
        num_largest: Rank of the largest of the three magnitudes [k].

    Returns:
        The index; infinite if the spacings are equal, NaN if one of them is zero or a sample is not finite.

    Raises:
        ValueError: If there are not 4k samples that are not zero.

    Example:
        >>> pickands_tail_index(torch.tensor([7.0, -3.0, 2.0, 1.0]), 1)  # ln 2 / ln 2
        1.0
    """
    top = _largest(samples, num_largest, 4 * num_largest)
    first, second, fourth = (top[rank * num_largest - 1] for rank in (1, 2, 4))
    upper, lower = float(first - second), float(second - fourth)
    if not (upper > 0 and lower > 0):
        return math.nan  # ties say nothing of the tail
    gamma = math.log(upper / lower)
    return math.log(2) / gamma if gamma else math.inf


def dedh_tail_index(samples: Tensor, num_largest: int) -> float:
    r"""Compute the moment estimator of Dekkers, Einmahl and de Haan, 1/γ, which also sees that a tail is light.

    .. math:: \gamma = M_1 + 1 - \tfrac12 \big/ (1 - M_1^2/M_2)

    where :math:`M_r` is the mean of :math:`(\ln X_{(i)}/X_{(k+1)})^r`. A negative index says that the tail is bounded,
    an infinite one that it falls faster than any power.

    Args:
        samples: The samples, in any order.
        num_largest: How many of the largest magnitudes to use [k].

    Returns:
        The index; NaN if a sample is not finite.

    Raises:
        ValueError: If there are not k + 1 samples that are not zero.

    Example:
        >>> round(dedh_tail_index(torch.tensor([8.0, -4.0, 2.0, 1.0]), 2), 4)
        -0.3378
    """
    logs = _log_excesses(samples, num_largest)
    first, second = float(logs.mean()), float(logs.square().mean())
    gap = 1 - first**2 / second if second else 0.0
    gamma = first + 1 - 0.5 / gap if gap else -math.inf
    return 1 / gamma if gamma else math.inf


def mcculloch_tail_index(samples: Tensor) -> float:
    """Look up (q₉₅ − q₀₅)/(q₇₅ − q₂₅) in a table for symmetric stable laws: McCulloch's estimator.

    The result is between 0.8 and 2, where the table ends. Cost: one sort of the samples.

    Args:
        samples: The samples, in any order.

    Returns:
        The index; NaN if the inner quantiles are equal or a sample is not finite.

    Raises:
        ValueError: If there are fewer than 20 samples.

    Example:
        >>> round(mcculloch_tail_index(torch.linspace(-1.57, 1.57, 999).tan()), 2)  # Cauchy
        1.0
    """
    flat = samples.detach().flatten().double().sort().values
    expect(len(flat) >= 20, "samples", "at least 20 numbers", len(flat), "Quantiles need more.")
    if not bool(flat.isfinite().all()):  # sorting puts NaN above all numbers, as if it were large
        return math.nan
    q05, q25, q75, q95 = (_quantile(flat, q) for q in (0.05, 0.25, 0.75, 0.95))
    if q75 == q25:
        return math.nan
    return _interpolate((q95 - q05) / (q75 - q25))


def ecf_tail_index(samples: Tensor, arguments: tuple[float, float] = (0.2, 1.0)) -> float:
    r"""Estimate the index by the empirical characteristic function φ of the samples over their median magnitude.

    .. math:: \alpha = \ln\frac{\ln|\varphi(t_1)|}{\ln|\varphi(t_2)|} \Big/ \ln\frac{t_1}{t_2}

    The most accurate of these estimators for symmetric stable laws.

    Args:
        samples: The samples, in any order.
        arguments: Points at which φ is evaluated [t₁, t₂].

    Raises:
        ValueError: If the arguments are not two different positive numbers.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> round(ecf_tail_index(torch.randn(10**5, generator=generator)), 1)
        2.0
    """
    first, second = arguments
    is_pair = first > 0 and second > 0 and first != second
    expect(is_pair, "arguments", "two different positive numbers", arguments, "Try (0.2, 1).")
    flat = samples.detach().flatten().double()
    # The median: a heavy tail has no standard deviation to scale by.
    scale = flat.abs().median()
    decays = [
        float(torch.exp(1j * t * flat / scale).mean().abs().log().neg()) for t in (first, second)
    ]
    if not min(decays) > 0:
        return math.nan  # |φ| = 1, as for equal samples
    return math.log(decays[0] / decays[1]) / math.log(first / second)


def sample_stable(
    alpha: float,
    shape: int | tuple[int, ...],
    scale: float = 1.0,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    r"""Draw independent samples of the symmetric α-stable law with characteristic function :math:`e^{-|st|^\alpha}`.

    .. math::
        \frac{\sin\alpha U}{(\cos U)^{1/\alpha}} \Big(\frac{\cos((1-\alpha)U)}{W}\Big)^{(1-\alpha)/\alpha}, \qquad
        U \sim \mathrm{Uniform}(-\tfrac\pi2, \tfrac\pi2),\; W \sim \mathrm{Exponential}(1)

    α = 2 is Gaussian with variance 2s², α = 1 is Cauchy.

    Args:
        alpha: Index of the law [α], in (0, 2].
        shape: Shape of the tensor.
        scale: Scale of the law [s].
        generator: Source of the random numbers; by default torch's global generator.
        dtype: Type of the result; computed in float64.

    Raises:
        ValueError: If ``alpha`` or ``scale`` is out of range, or ``dtype`` is no floating-point type.

    Example:
        >>> sample_stable(1.5, (2, 3), generator=torch.Generator().manual_seed(0)).shape
        torch.Size([2, 3])

    Reference:
        J. M. Chambers, C. L. Mallows, B. W. Stuck. A Method for Simulating Stable Random Variables. Journal of the
        American Statistical Association 71, 1976.
    """
    expect(0 < alpha <= 2, "alpha", "in (0, 2]", alpha, "2 is Gaussian, 1 is Cauchy.")
    expect(0 < scale < math.inf, "scale", "a positive number", scale, "The default is 1.")
    remedy = "The default is torch.float64."
    expect(dtype.is_floating_point, "dtype", "a floating-point type", dtype, remedy)
    device = "cpu" if generator is None else generator.device
    uniform = torch.rand(shape, generator=generator, dtype=torch.float64, device=device)
    U = (uniform - 0.5) * math.pi
    if alpha == 1:  # the formula below has the power 0 of a number that may be 0
        return (scale * U.tan()).to(dtype)
    W = torch.empty_like(U).exponential_(generator=generator)
    power = ((1 - alpha) * U).cos().div(W).pow((1 - alpha) / alpha)
    return (scale * (alpha * U).sin() / U.cos().pow(1 / alpha) * power).to(dtype)


def _log_excesses(samples: Tensor, num_largest: int) -> Tensor:
    top = _largest(samples, num_largest, num_largest + 1)
    return (top[:-1] / top[-1]).log()


def _largest(samples: Tensor, num_largest: int, num_needed: int) -> Tensor:
    """Return the largest magnitudes in descending order; NaN if a sample is not finite."""
    magnitudes = samples.detach().flatten().double().abs()
    magnitudes = magnitudes[magnitudes != 0]
    expect(
        num_largest >= 1 and num_needed <= len(magnitudes),
        "num_largest",
        f"at least 1 and small enough for {len(magnitudes)} samples that are not zero",
        num_largest,
        "Take about a hundredth of the samples.",
    )
    if not bool(magnitudes.isfinite().all()):
        return torch.full((num_needed,), math.nan, dtype=torch.float64)
    return magnitudes.topk(num_needed).values


def _quantile(values: Tensor, share: float) -> float:
    """Interpolate a quantile of sorted values; ``torch.quantile`` refuses more than 2²⁴ values."""
    place = share * (len(values) - 1)
    low = int(place)
    rest = place - low
    return float(values[low] * (1 - rest) + values[min(low + 1, len(values) - 1)] * rest)


def _interpolate(ratio: float) -> float:
    """Look up α by the ratio of quantiles; ratios outside of the table give its ends."""
    table = list(_QUANTILE_RATIOS.items())
    for (alpha, low), (below, high) in pairwise(table):
        if ratio <= high:
            return alpha + (below - alpha) * max(ratio - low, 0.0) / (high - low)
    return table[-1][0]
