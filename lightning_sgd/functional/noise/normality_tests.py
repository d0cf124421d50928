r"""Tests whether samples come from some normal distribution, for many samples at once and on any device.

All three compare the samples with normal ones of unknown mean and variance, so that neither shift nor scale matters.
Rows are sorted and summed in one batched call, in float64 whatever the type of the samples, so that a thousand rows
cost little more than the sort.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_sgd._validation import expect

MIN_SAMPLES, MAX_SAMPLES = 3, 5000

# Royston's polynomials, lowest power first: ends of the weights over n^(-1/2), then mean and log deviation of the
# normalising transform over n up to eleven samples and over ln n from there on.
_LAST = (0.0, 0.221157, -0.147981, -2.071190, 4.434685, -2.706056)
_LAST_BUT_ONE = (0.0, 0.042981, -0.293762, -1.752461, 5.682633, -3.582633)
_FEW_SHIFT = (-2.273, 0.459)
_FEW_MEAN, _FEW_SPREAD = (
    (0.5440, -0.39978, 0.025054, -6.714e-4),
    (1.3822, -0.77857, 0.062767, -0.0020322),
)
_MANY_MEAN, _MANY_SPREAD = (
    (-1.5861, -0.31082, -0.083751, 0.0038915),
    (-0.4803, -0.082676, 0.0030302),
)
_FEW = 11

# Stephens' approximation: from this A* on, the coefficients of ln p or of ln(1 - p).
_UPPER = ((0.6, (1.2937, -5.709, 0.0186)), (0.34, (0.9177, -4.279, -1.38)))
_LOWER = ((0.2, (-8.318, 42.796, -59.938)), (-math.inf, (-13.436, 101.14, -223.73)))
_TURNING_POINT = 5.709 / (2 * 0.0186)


class NormalityTest(NamedTuple):
    """Statistic and p-value of each row.

    The p-value is the probability that normal samples give a statistic at least as far from that of a normal law.
    """

    statistic: Tensor
    p_value: Tensor


def shapiro_wilk(samples: Tensor, dim: int = -1) -> NormalityTest:
    r"""Test of Shapiro and Wilk, with the weights and p-values of Royston's algorithm AS R94.

    .. math::
        W = \frac{\big(\sum_i a_i x_{(i)}\big)^2}{\sum_i (x_i - \bar x)^2}

    is the squared correlation of the sorted samples with weights *a*, close to the expected order statistics of normal
    samples: 1 for perfectly normal ones, less for others. The most powerful of the three against most alternatives.
    Ties are allowed; many ties are evidence against normality.

    Cost: a sort of each row, in the type of the samples; sums in float64. Equal to ``scipy.stats.shapiro`` to about
    1e-9 in W, which is the accuracy of its normal quantiles.

    Args:
        samples: Any number of dimensions; each row along ``dim`` is a sample of 3 to 5000 values.
        dim: Dimension of the values of one sample.

    Returns:
        W and its p-value, in float64, without the dimension ``dim``; NaN for rows that are constant or not finite.

    Raises:
        ValueError: If there are fewer than 3 or more than 5000 values, where the p-value is not valid.

    Example:
        >>> w, p = shapiro_wilk(torch.arange(1.0, 13.0))
        >>> round(w.item(), 7), round(p.item(), 6)
        (0.9668964, 0.875731)

    Reference:
        Patrick Royston. Remark AS R94: A remark on algorithm AS 181: the W-test for normality. Applied Statistics,
        1995.
    """
    rows = _standardized(_sorted(samples, dim, MAX_SAMPLES))
    num = rows.shape[-1]
    weights = _weights(num).to(rows.device)
    fitted = rows @ weights
    # 1 - W is the rest of a projection; the difference of two numbers near 1 would lose half of the digits.
    rest = _length(rows.addcmul_(fitted[..., None], weights, value=-1)).squeeze(-1).square()
    return NormalityTest(1 - rest, _p_value_of_rest(rest, num))


def anderson_darling(samples: Tensor, dim: int = -1) -> NormalityTest:
    r"""Test of Anderson and Darling: distance of the empirical distribution from the fitted normal one, tails most.

    .. math::
        A^2 = -n - \frac1n \sum_{i=1}^n (2i - 1)\,\big[\ln\Phi(y_{(i)}) + \ln\big(1 - \Phi(y_{(n+1-i)})\big)\big],
        \qquad y_i = \frac{x_i - \bar x}{s}

    The p-value is Stephens' approximation for :math:`A^2(1 + 0.75/n + 2.25/n^2)`, good to about a tenth of itself below
    0.2; it agrees with the critical values of ``scipy.stats.anderson``, whose statistic this is.

    Cost: a sort of each row, in the type of the samples, and two logarithms of Φ per value.

    Args:
        samples: Any number of dimensions; each row along ``dim`` is a sample of at least 3 values.
        dim: Dimension of the values of one sample.

    Returns:
        A² and its p-value, in float64, without the dimension ``dim``; NaN for rows that are constant or not finite.

    Raises:
        ValueError: If there are fewer than 3 values.

    Example:
        >>> a, p = anderson_darling(torch.arange(1.0, 13.0))
        >>> round(a.item(), 5), round(p.item(), 4)
        (0.15302, 0.9415)

    Reference:
        Michael A. Stephens. Tests based on EDF statistics. In: Goodness-of-fit techniques. 1986.
    """
    rows = _standardized(_sorted(samples, dim))
    num = rows.shape[-1]
    # Rows have length one; times √(n − 1) they have the standard deviation one of n − 1 degrees of freedom.
    y = rows * math.sqrt(num - 1)
    odd = torch.arange(1, 2 * num, 2, dtype=y.dtype, device=y.device)
    # Not the logarithm of Φ, which is log 0 in the lower tail; and Φ(−y) for 1 − Φ(y), which cancels in the upper one.
    logs = torch.special.log_ndtr(y) + torch.special.log_ndtr(-y.flip(-1))
    statistic = -num - (logs @ odd) / num
    return NormalityTest(statistic, _stephens(statistic * (1 + 0.75 / num + 2.25 / num**2)))


def jarque_bera(samples: Tensor, dim: int = -1) -> NormalityTest:
    r"""Test of Jarque and Bera, by the skewness S and the excess kurtosis K of the samples.

    .. math::
        JB = \frac n6 \Big(S^2 + \frac{K^2}4\Big), \qquad p = e^{-JB/2}

    The p-value is that of the limit of many values: of normal samples of 50 values 3.8 % instead of 5 % are rejected
    at the 5 % level, of 256 values 4.7 %.

    Cost: no sort, three sums. Equal to ``scipy.stats.jarque_bera``.

    Args:
        samples: Any number of dimensions; each row along ``dim`` is a sample of at least 3 values.
        dim: Dimension of the values of one sample.

    Returns:
        JB and its p-value, in float64, without the dimension ``dim``; NaN for rows that are constant or not finite.

    Raises:
        ValueError: If there are fewer than 3 values.

    Example:
        >>> jb, p = jarque_bera(torch.arange(1.0, 13.0))
        >>> round(jb.item(), 6), round(p.item(), 4)
        (0.740281, 0.6906)

    Reference:
        Carlos M. Jarque, Anil K. Bera. Efficient tests for normality, homoscedasticity and serial independence of
        regression residuals. Economics Letters, 1980.
    """
    rows = _standardized(_rows(samples, dim, math.inf))
    num = rows.shape[-1]
    squares = rows.square()
    # Rows have length one, so moments in units of the standard deviation need a power of n only.
    skewness = (squares * rows).sum(dim=-1) * math.sqrt(num)
    kurtosis = squares.square().sum(dim=-1) * num - 3
    statistic = num / 6 * (skewness.square() + kurtosis.square() / 4)
    return NormalityTest(statistic, (-statistic / 2).exp())


def _rows(samples: Tensor, dim: int, largest: float) -> Tensor:
    remedy = "Give more or fewer samples, or another `dim`."
    expect(samples.ndim >= 1, "samples", "of one dimension at least", samples.ndim, remedy)
    real = samples.is_floating_point()
    expect(real, "samples", "real numbers", samples.dtype, "Convert them to a floating-point type.")
    num, bound = samples.shape[dim], "at least 3" if math.isinf(largest) else "3 to 5000"
    expect(MIN_SAMPLES <= num <= largest, "samples", f"{bound} values in each row", num, remedy)
    rows = samples.detach().movedim(dim, -1)
    return rows.cpu() if rows.device.type == "mps" else rows  # which has no float64


def _sorted(samples: Tensor, dim: int, largest: float = math.inf) -> Tensor:
    rows = _rows(samples, dim, largest)
    if rows.device.type != "cpu":
        return rows.sort(dim=-1).values
    wide = rows.float() if rows.dtype in (torch.float16, torch.bfloat16) else rows
    # NumPy sorts with vector instructions, ten to thirty times as fast as torch.
    return torch.from_numpy(np.sort(wide.numpy(), axis=-1))


def _standardized(rows: Tensor) -> Tensor:
    """Convert to float64, subtract the mean and scale to length one; NaN if constant or not finite."""
    middle = rows[..., rows.shape[-1] // 2, None].double()
    # Subtract one of the values first: near a large mean this difference is exact, that of the mean is not.
    centered = rows.double() - torch.where(middle.isfinite(), middle, torch.nan)
    low, high = centered.aminmax(dim=-1, keepdim=True)
    largest = torch.maximum(high, -low)
    # Powers of two change no digit, and keep squares of extreme scales finite; 0/0 marks constant rows.
    centered *= torch.where(
        largest > 0, torch.exp2(-largest.log2().floor()).clamp(max=2.0**1000), torch.nan
    )
    centered -= centered.mean(dim=-1, keepdim=True)
    return centered / _length(centered)


def _length(vectors: Tensor) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    return length


@lru_cache(maxsize=32)
def _weights(num: int) -> Tensor:
    """Compute the weights a, antisymmetric and of length one."""
    if num == MIN_SAMPLES:
        return torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64) / math.sqrt(2)
    # Blom's approximation of the expected order statistics of normal samples.
    places = (torch.arange(1, num + 1, dtype=torch.float64) - 0.375) / (num + 0.25)
    scores = torch.special.ndtri(places)
    weights = scores / _length(scores)
    ends = [_polynomial(_LAST, num**-0.5) + float(weights[-1])]
    # For up to five samples Royston corrects only the outermost weights.
    if num > 5:
        ends.append(_polynomial(_LAST_BUT_ONE, num**-0.5) + float(weights[-2]))
    inner = scores[len(ends) : num - len(ends)]
    rest = 1 - 2 * sum(end**2 for end in ends)
    upper = torch.tensor(ends, dtype=torch.float64)
    weights = torch.cat([-upper, inner * (math.sqrt(rest) / _length(inner)), upper.flip(0)])
    return weights / _length(weights)


def _p_value_of_rest(rest: Tensor, num: int) -> Tensor:
    """Compute Royston's p-value of W from 1 - W."""
    if num == MIN_SAMPLES:
        # Three samples have an exact law: W is between 3/4 and 1.
        angle = (1 - rest).sqrt().asin() - math.asin(math.sqrt(0.75))
        return (6 / math.pi * angle).clamp(0.0, 1.0)
    log_rest = rest.log()
    if num <= _FEW:
        shifted = _polynomial(_FEW_SHIFT, num) - log_rest
        mean, spread = _polynomial(_FEW_MEAN, num), math.exp(_polynomial(_FEW_SPREAD, num))
        # Beyond the shift the transform is not defined: W is so small that p is zero, which an infinite z gives.
        z = torch.where(shifted > 0, (-shifted.log() - mean) / spread, torch.inf)
        z = torch.where(shifted.isnan(), torch.nan, z)
    else:
        log_num = math.log(num)
        spread = math.exp(_polynomial(_MANY_SPREAD, log_num))
        z = (log_rest - _polynomial(_MANY_MEAN, log_num)) / spread
    return 0.5 * torch.erfc(z / math.sqrt(2))


def _stephens(adjusted: Tensor) -> Tensor:
    """Compute the p-value of the adjusted A²; beyond its turning point the fitted parabola would rise again."""
    x = adjusted.clamp(max=_TURNING_POINT)
    p_value = torch.full_like(x, torch.nan)
    for begin, coefficients in reversed(_LOWER):
        # 1 − exp without cancellation where p is small.
        p_value = torch.where(x >= begin, -torch.expm1(_polynomial(coefficients, x)), p_value)
    for begin, coefficients in reversed(_UPPER):
        p_value = torch.where(x >= begin, torch.exp(_polynomial(coefficients, x)), p_value)
    return p_value


def _polynomial(coefficients: Sequence[float], x: float | Tensor) -> Any:
    value: float | Tensor = 0.0
    for coefficient in reversed(coefficients):
        value = value * x + coefficient
    return value
