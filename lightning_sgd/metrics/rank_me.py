"""RankMe, exact over a whole epoch and over all ranks, as a torchmetrics ``Metric``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_sgd._validation import expect, is_finite_at_least
from lightning_sgd.functional.spectra.gram import gram_singular_values
from lightning_sgd.functional.spectra.rank_measures import rankme
from lightning_sgd.metrics._scalar_metric import ScalarMetric


class RankMe(ScalarMetric):
    r"""Effective rank of features, for self-supervised learning without labels.

    .. math:: \exp\Big(-\sum_k p_k \log p_k\Big), \qquad p_k = \sigma_k(Z) \Big/ \sum_j \sigma_j(Z) + \epsilon

    where the rows of Z (N × K) are the features of all samples since the last reset. Z is never stored: its singular
    values come from :math:`Z^\top Z`, which batches and ranks only add to. They are exact down to
    :math:`10^{-8} \sigma_1`; between samples the metric keeps K² + K + 1 numbers in float64.

    The shares are not normalised again after adding ε, so that the value can be slightly above min(N, K).

    Args:
        eps: The constant [ε]; 1e-7 in the paper, 1e-5 in some other implementations.
        center: Whether to subtract the mean feature first. The paper does not: features with a large common part then
            have a low rank.
        **kwargs: Settings of every ``torchmetrics.Metric``.

    Raises:
        ValueError: If ``eps`` is negative.

    Example:
        >>> metric = RankMe()
        >>> metric.update(torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]]))
        >>> metric.update(torch.tensor([[0.0, 0.0, 1.0]]))
        >>> round(metric.compute().item(), 4)
        2.8284

    Reference:
        Quentin Garrido et al. RankMe: Assessing the downstream performance of pretrained self-supervised
        representations by their rank. ICML, 2023. https://arxiv.org/abs/2210.02885
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    plot_lower_bound = 0.0

    gram: Tensor
    total: Tensor
    num_samples: Tensor

    def __init__(self, eps: float = 1e-7, center: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        expect(is_finite_at_least(eps, 0.0), "eps", "at least 0", eps, "The default is 1e-7.")
        self.eps, self.center = eps, center
        # Scalars take the shape of the first update by broadcasting: K is not known before.
        for name in ("gram", "total", "num_samples"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, features: Tensor) -> None:
        """Add the features of some samples.

        Args:
            features: Tensor of shape (N, K); N may differ between updates. Before the ranks of a distributed run are
                combined, each must have had an update.
        """
        shape = tuple(features.shape)
        expect(features.ndim == 2, "features", "of shape (N, K)", shape, "Flatten or pool them.")
        # In float64, because singular values come from squares: in float32 those below 3e-4 of the largest would be
        # lost.
        Z = features.detach().double()
        # Not in place: a scalar cannot broadcast itself to the shape of the first update.
        self.gram = self.gram + Z.mT @ Z
        self.total = self.total + Z.sum(dim=0)
        self.num_samples = self.num_samples + len(Z)

    def compute(self) -> Tensor:
        """Compute RankMe of all features so far; 0 if all are zero, NaN if there are none or some are not finite."""
        if self.gram.ndim == 0:
            return torch.full_like(self.gram, torch.nan)
        gram = self.gram
        if self.center:
            # In float64: with a large mean this difference loses digits.
            gram = gram - torch.outer(self.total, self.total) / self.num_samples
        # RankMe counts zeros, too, but only as many as an N × K matrix has; the Gram matrix has K.
        count = min(len(gram), int(self.num_samples))
        return rankme(gram_singular_values(gram)[:count], eps=self.eps)
