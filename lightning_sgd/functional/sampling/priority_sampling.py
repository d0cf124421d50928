r"""Priority sampling: probabilities, importance weights, what they do to the variance, and the published rules.

Sample i of N has a score :math:`s_i \ge 0`, which may be out of date, and a value :math:`v_i = (s_i + \epsilon)^\alpha`
with the sum V. It is drawn with probability

.. math:: p_i = (1 - \lambda)\,v_i / V + \lambda / N

and its loss is multiplied by :math:`w_i = (N p_i)^{-\beta}`. With :math:`\beta = 1` the mean of :math:`w_i g_i` over
draws has the full gradient as its expectation, whatever the scores, if :math:`p_i` is the probability of that very
draw. :math:`\lambda` bounds the weights by :math:`\lambda^{-\beta}`.
"""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

import torch
from torch import Tensor

WeightNorm: TypeAlias = Literal["none", "mean", "max"]


def mixed_probabilities(values: Tensor, uniform_mix: float) -> Tensor:
    """Compute probabilities in proportion to values, mixed with the uniform ones; uniform where all values are 0.

    Args:
        values: One for each sample [v], ≥ 0.
        uniform_mix: Share of the uniform ones [λ].

    Example:
        >>> mixed_probabilities(torch.tensor([1.0, 3.0]), 0.5)
        tensor([0.3750, 0.6250])
    """
    total, uniform = values.sum(), 1 / len(values)
    if total <= 0:
        return torch.full_like(values, uniform)
    return (1 - uniform_mix) / total * values + uniform_mix * uniform


def importance_weights(probabilities: Tensor, num_samples: int, beta: float) -> Tensor:
    """Compute the weights of the losses of drawn samples.

    Args:
        probabilities: With which each was drawn [p].
        num_samples: Size of the data set [N].
        beta: 1 for an unbiased gradient, 0 for no correction [β].

    Example:
        >>> importance_weights(torch.tensor([0.25, 0.125]), 4, 1.0)
        tensor([1., 2.])
    """
    return (num_samples * probabilities) ** -beta


def normalized_weights(weights: Tensor, norm: WeightNorm, largest: float) -> Tensor:
    """Divide weights by the largest possible one, or by their mean; both make the gradient biased.

    Args:
        weights: Of the samples of a batch [w].
        norm: What to divide by.
        largest: The largest weight that any sample can have.
    """
    if norm == "none":
        return weights
    return weights / (largest if norm == "max" else weights.mean())


def priority_values(scores: Tensor, offset: float, alpha: float) -> Tensor:
    """Compute the values that a sum tree holds for scores: (s + ε)^α, float64.

    Args:
        scores: ≥ 0 [s].
        offset: Keeps samples with a score of 0 in play [ε].
        alpha: 1 for in proportion, 0 for uniform [α].
    """
    return (scores.double() + offset) ** alpha


def effective_sample_size(weights: Tensor) -> float:
    """Compute the number of equally weighted samples that give the same variance.

    Example:
        >>> round(effective_sample_size(torch.tensor([1.0, 1.0, 1.0, 5.0])), 6)
        2.285714
    """
    total, squares = weights.double().sum(), weights.double().square().sum()
    return float(total**2 / squares) if squares > 0 else float(len(weights))


def batch_size_gain(scores: Tensor) -> float:
    r"""By how much uniform sampling would have to enlarge a batch to come to the variance of sampling by scores [τ].

    :math:`\tau = \sqrt{n \sum_j \gamma_j^2}` with :math:`\gamma = s / \sum s`, which is Katharopoulos and Fleuret's
    :math:`1/\sqrt{1 - \sum_j (\gamma_j - 1/n)^2 / \sum_j \gamma_j^2}`; its square is the factor. 1 where all scores
    are 0.

    Example:
        >>> round(batch_size_gain(torch.tensor([1.0, 1.0, 1.0, 5.0])), 6)
        1.322876
    """
    return math.sqrt(len(scores) / effective_sample_size(scores))


def presample_threshold(num_candidates: int, batch_size: int) -> float:
    """Compute the gain above which presampling pays: a forward pass costs one, a backward pass two.

    Args:
        num_candidates: Samples that are looked at [B].
        batch_size: Samples that are trained on [b].

    Example:
        >>> presample_threshold(96, 32)
        2.0
    """
    return (num_candidates + 3 * batch_size) / (3 * batch_size)


def gradient_variance(norms: Tensor, probabilities: Tensor, mean_norm: float) -> float:
    r"""Variance of one weighted draw, :math:`\frac{1}{N^2}\sum_i \|g_i\|^2/p_i - \|\bar g\|^2`, at β = 1.

    Args:
        norms: Norm of the gradient of each sample.
        probabilities: With which each is drawn.
        mean_norm: Norm of the mean gradient.

    Example:
        >>> norms = torch.tensor([1.0, 2.0, 3.0, 4.0])
        >>> gradient_variance(norms, torch.full((4,), 0.25), 2.5)
        1.25
    """
    second_moment = (norms.double() ** 2 / probabilities.double()).sum() / len(norms) ** 2
    return float(second_moment) - mean_norm**2


def decayed_scores(scores: Tensor, ages: Tensor, half_life: float) -> Tensor:
    """Move scores towards their mean as they get older.

    Args:
        scores: Of all samples [s].
        ages: Since each was measured.
        half_life: Age at which half of the distance to the mean is left, in the unit of ``ages``.

    Example:
        >>> decayed_scores(torch.tensor([0.0, 4.0]), torch.tensor([0.0, 5.0]), 5.0)
        tensor([0., 3.])
    """
    mean = scores.mean(dtype=torch.float64).to(scores.dtype)
    return mean + (scores - mean) * torch.exp2(-ages.to(scores.dtype) / half_life)


def rank_values(scores: Tensor, pressure: float) -> Tensor:
    r"""Values that fall geometrically with the rank: :math:`q^{\text{rank}}`, :math:`q = e^{-\ln(s_e)/N}`, float64.

    Args:
        scores: Of all samples; the largest has rank 0.
        pressure: How many times likelier the first is than the last, about [s_e].
    """
    ranks = torch.empty(len(scores), dtype=torch.float64)
    ranks[scores.argsort(descending=True, stable=True)] = torch.arange(
        len(scores), dtype=torch.float64
    )
    return torch.exp(ranks * (-math.log(pressure) / len(scores)))


def geometric_ranks(numbers: Tensor, num_samples: int, pressure: float) -> Tensor:
    """Draw ranks from the distribution of :func:`rank_values` in closed form, without a table.

    Args:
        numbers: Uniform in [0, 1).
        num_samples: Size of the data set [N].
        pressure: How many times likelier the first is than the last [s_e].
    """
    if pressure == 1.0:
        return (numbers * num_samples).long()
    log_q = -math.log(pressure) / num_samples
    ranks = torch.log1p(numbers * math.expm1(num_samples * log_q)) / log_q
    return ranks.long().clamp(max=num_samples - 1)


def annealed(start: float, end: float, progress: float, geometric: bool = False) -> float:
    """Interpolate between ``start`` at progress 0 and ``end`` at 1, in equal steps or by equal factors.

    Example:
        >>> annealed(0.4, 1.0, 0.5), annealed(100.0, 1.0, 0.5, geometric=True)
        (0.7, 10.0)
    """
    progress = min(max(progress, 0.0), 1.0)
    if geometric:
        return float(start * (end / start) ** progress)
    return start + (end - start) * progress


def top_fraction(scores: Tensor, fraction: float) -> Tensor:
    """1 for the share of samples with the largest scores, at least one, and 0 for the others, float64."""
    values = torch.zeros(len(scores), dtype=torch.float64)
    values[scores.topk(max(1, round(fraction * len(scores)))).indices] = 1.0
    return values


def sharded_weights(
    probabilities: Tensor, num_samples: int, num_shards: int, beta: float
) -> Tensor:
    r"""Weights where every rank draws from a shard of its own: :math:`(R / (N p_{i|r}))^\beta`.

    With the mean over ranks that DDP takes, the gradient is unbiased at β = 1, also for shards of unequal size.

    Args:
        probabilities: With which each was drawn by its rank.
        num_samples: Size of all shards together [N].
        num_shards: Number of ranks [R].
        beta: 1 for an unbiased gradient, 0 for no correction [β].
    """
    return (num_samples / num_shards * probabilities) ** -beta
