r"""The noise scale of gradients: the batch size at which noise and signal are equally large.

A gradient of b samples has the mean G and the squared length E‖g‖² = ‖G‖² + Tr(Σ)/b. From m gradients at one point

    ‖G‖² ≈ mean of ⟨g_i, g_j⟩ over pairs,     Tr(Σ) ≈ b·(mean of ‖g_i‖² − that),

both without a bias. Batches of b and of mb samples, the second being the mean of the first, give the same numbers.
Their ratio Tr(Σ)/‖G‖² is the noise scale. Ratios of single estimates are biased and have no variance, so sums over
points are divided. Along the gradient, a quadratic model gives for steps of the best size

    steps(B) = steps(∞)·(1 + scale/B),     samples(B) = samples(0)·(1 + B/scale).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass

import torch
from torch import Tensor

from lightning_sgd._validation import expect


@dataclass(frozen=True, slots=True)
class GradientNoise:
    """Estimates of signal and noise from several gradients at one point; sums over points are meaningful.

    Attributes:
        trace: Variance of a gradient of one sample, summed over coordinates [Tr Σ].
        gradient_sq: Squared length of the mean gradient, without the noise in it; may be negative [‖G‖²].
        var_trace: Variance of the estimate ``trace``.
        var_gradient_sq: Variance of the estimate ``gradient_sq``.
        covariance: Covariance of the two estimates.
        num_pairs: Number of gradients less 1.
    """

    trace: float
    gradient_sq: float
    var_trace: float
    var_gradient_sq: float
    covariance: float
    num_pairs: int


@dataclass(frozen=True, slots=True)
class NoiseScale:
    """A noise scale with an interval.

    Attributes:
        value: The noise scale in samples; infinite if no gradient is found in the noise.
        low: Lower end of Fieller's interval of two standard errors.
        high: Upper end; infinite where the gradient might be zero.
    """

    value: float
    low: float
    high: float


def gradient_noise(rows: Tensor, batch_size: int) -> GradientNoise:
    """Estimate signal and noise from gradients at one point.

    Variances are by the jackknife, leaving out one gradient at a time. They are too large by a factor between 1 and 2
    if noise outweighs the mean gradient by far, and never too small on average. For two gradients, of which none can be
    left out, they are second moments, which is right for the ratio of sums over many points.

    Args:
        rows: One gradient, or sketch of a gradient, in each row, shape (m, s).
        batch_size: Samples behind one row [b].

    Raises:
        ValueError: If there are fewer than two rows.

    Example:
        >>> noise = gradient_noise(torch.tensor([[3.0, 1.0], [1.0, 1.0]]), batch_size=4)
        >>> noise.trace, noise.gradient_sq  # 4·|g₁ − g₂|²/2 and ⟨g₁, g₂⟩
        (8.0, 4.0)
    """
    m = len(rows)
    remedy = "Noise is in differences between gradients."
    expect(m >= 2, "rows", "of two gradients or more", tuple(rows.shape), remedy)
    wide = rows.double()
    gram = wide @ wide.T
    own, total = gram.diagonal(), gram.sum()
    trace, gradient_sq = _estimates(own.sum(), total, m, batch_size)
    if m == 2:
        t, g = float(trace), float(gradient_sq)
        return GradientNoise(t, g, t * t, g * g, t * g, 1)
    # The estimates without each gradient in turn, from sums of the one Gram matrix.
    left = _estimates(own.sum() - own, total - 2 * gram.sum(dim=1) + own, m - 1, batch_size)
    spread = torch.stack(left)
    spread = spread - spread.mean(dim=1, keepdim=True)
    # The jackknife: estimates without one of m differ little, and their spread times (m − 1)/m is the variance.
    (var_trace, cov), (_, var_sq) = ((m - 1) / m * spread @ spread.T).tolist()
    return GradientNoise(float(trace), float(gradient_sq), var_trace, var_sq, cov, m - 1)


def _estimates(squares: Tensor, total: Tensor, m: int, b: int) -> tuple[Tensor, Tensor]:
    # Pairs of different gradients only: their noise is independent, so it does not lengthen the product on average.
    gradient_sq = (total - squares) / (m * (m - 1))
    return b * (squares / m - gradient_sq), gradient_sq


def total_noise(looks: Sequence[GradientNoise]) -> GradientNoise:
    """Sum the estimates over several points.

    Args:
        looks: Estimates of at least one point.
    """
    return GradientNoise(*(sum(column) for column in zip(*map(astuple, looks), strict=True)))


def noise_scale(noise: GradientNoise) -> NoiseScale:
    """Divide noise by signal, in samples.

    Args:
        noise: Estimates of one point, or summed over several.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> rows = 0.1 + torch.randn(64, 1000, generator=generator)  # ‖G‖² = 10, Tr Σ = 32·1000
        >>> scale = noise_scale(gradient_noise(rows, batch_size=32))
        >>> scale.low < 3200 < scale.high
        True
    """
    s, g = noise.trace, noise.gradient_sq
    value = s / g if g > 0 else (math.inf if s > 0 else math.nan)
    if noise.num_pairs < 2 or not math.isfinite(s + g):
        return NoiseScale(value, 0.0, math.inf)
    # Fieller: all θ with (s − θg)² ≤ 4·Var(s − θg), a quadratic inequality. The factor corrects the jackknife for few
    # gradients. A ratio of normal estimates has no variance, so an interval value ± error would be wrong.
    factor = 4 * noise.num_pairs / (noise.num_pairs - 1)
    a = g * g - factor * noise.var_gradient_sq
    b = s * g - factor * noise.covariance
    c = s * s - factor * noise.var_trace
    root = math.sqrt(max(b * b - a * c, 0.0))
    if a > 0 and g > 0:
        return NoiseScale(value, max((b - root) / a, 0.0), max((b + root) / a, 0.0))
    # A gradient of length zero cannot be excluded: the interval has no upper end.
    low = (b - root) / a if a < 0 < c else 0.0
    return NoiseScale(value, max(low, 0.0), math.inf)


def power_of_two(samples: float) -> int:
    """Round to the nearest power of two, in logarithms, at least 1.

    Args:
        samples: A finite number.

    Example:
        >>> power_of_two(100.0), power_of_two(0.3)
        (128, 1)
    """
    return int(2 ** round(math.log2(max(samples, 1.0))))


def steps_ratio(scale: float, batch_size: float, new_batch_size: float) -> float:
    """Compute the number of steps at another batch size over that at this one, each with its best step size.

    Its inverse is the ratio of the best step sizes.

    Args:
        scale: The noise scale.
        batch_size: Present number of samples in a step.
        new_batch_size: New number of samples in a step.

    Example:
        >>> steps_ratio(scale=100, batch_size=100, new_batch_size=200)
        0.75
    """
    if math.isinf(scale):
        return batch_size / new_batch_size
    return (1 + scale / new_batch_size) / (1 + scale / batch_size)
