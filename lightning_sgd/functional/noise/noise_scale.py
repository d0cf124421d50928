r"""The noise scale of gradients: the batch size at which noise and signal are equally large.

A gradient of b samples has the mean G and the squared length E‖g‖² = ‖G‖² + Tr(Σ)/b. From m gradients at one point

    ‖G‖² ≈ mean of ⟨g_i, g_j⟩ over pairs,     Tr(Σ) ≈ b·(mean of ‖g_i‖² − that),

both without a bias. It is what one gets from batches of b and of mb samples, the second being the mean of the first.
Their ratio Tr(Σ)/‖G‖² is the noise scale. Ratios of single estimates are biased and have no variance, so sums over
looks are divided. Along the gradient, a quadratic model gives for steps of the best size

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
    """What several gradients at one point say about signal and noise; sums over points are meaningful.

    Attributes:
        trace: Variance of a gradient of one sample, summed over coordinates [Tr Σ].
        gradient_sq: Squared length of the mean gradient, without the noise in it; may be negative [‖G‖²].
        var_trace: Variance of the first as an estimate.
        var_gradient_sq: Variance of the second.
        covariance: Of the two.
        num_pairs: Gradients less 1.
    """

    trace: float
    gradient_sq: float
    var_trace: float
    var_gradient_sq: float
    covariance: float
    num_pairs: int


@dataclass(frozen=True, slots=True)
class NoiseScale:
    """A noise scale and how well it is known.

    Attributes:
        value: In samples; infinite where no gradient is seen in the noise.
        low: Lower end of an interval of two standard errors, after Fieller.
        high: Upper end; infinite where the gradient might be zero.
    """

    value: float
    low: float
    high: float


def gradient_noise(rows: Tensor, batch_size: int) -> GradientNoise:
    """Signal and noise in gradients at one point.

    Variances are by the jackknife, leaving out one gradient at a time. They are too large by a factor between 1 and 2
    where noise outweighs the mean gradient by far, never too small on average. For two gradients, where nothing can be
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
    left = _estimates(own.sum() - own, total - 2 * gram.sum(dim=1) + own, m - 1, batch_size)
    spread = torch.stack(left)
    spread = spread - spread.mean(dim=1, keepdim=True)
    (var_trace, cov), (_, var_sq) = ((m - 1) / m * spread @ spread.T).tolist()
    return GradientNoise(float(trace), float(gradient_sq), var_trace, var_sq, cov, m - 1)


def _estimates(squares: Tensor, total: Tensor, m: int, b: int) -> tuple[Tensor, Tensor]:
    gradient_sq = (total - squares) / (m * (m - 1))
    return b * (squares / m - gradient_sq), gradient_sq


def total_noise(looks: Sequence[GradientNoise]) -> GradientNoise:
    """Sums over several points.

    Args:
        looks: At least one.
    """
    return GradientNoise(*(sum(column) for column in zip(*map(astuple, looks), strict=True)))


def noise_scale(noise: GradientNoise) -> NoiseScale:
    """Noise over signal, in samples.

    Args:
        noise: Of one point, or summed over several.

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
    # All θ with (s − θg)² ≤ 4·Var(s − θg): a quadratic inequality; the factor makes up for what the mean has used.
    factor = 4 * noise.num_pairs / (noise.num_pairs - 1)
    a = g * g - factor * noise.var_gradient_sq
    b = s * g - factor * noise.covariance
    c = s * s - factor * noise.var_trace
    root = math.sqrt(max(b * b - a * c, 0.0))
    if a > 0 and g > 0:
        return NoiseScale(value, max((b - root) / a, 0.0), max((b + root) / a, 0.0))
    # A gradient of length zero cannot be excluded: everything from some noise scale on is possible.
    low = (b - root) / a if a < 0 < c else 0.0
    return NoiseScale(value, max(low, 0.0), math.inf)


def power_of_two(samples: float) -> int:
    """The nearest power of two, in logarithms, at least 1.

    Args:
        samples: A finite number.

    Example:
        >>> power_of_two(100.0), power_of_two(0.3)
        (128, 1)
    """
    return int(2 ** round(math.log2(max(samples, 1.0))))


def steps_ratio(scale: float, batch_size: float, new_batch_size: float) -> float:
    """How many steps another batch size takes, each with its best step size, over those of this one.

    One over it is how much larger the best step is.

    Args:
        scale: The noise scale.
        batch_size: Samples in a step now.
        new_batch_size: Samples in a step then.

    Example:
        >>> steps_ratio(scale=100, batch_size=100, new_batch_size=200)
        0.75
    """
    if math.isinf(scale):
        return batch_size / new_batch_size
    return (1 + scale / new_batch_size) / (1 + scale / batch_size)
