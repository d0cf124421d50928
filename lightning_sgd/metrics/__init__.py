"""torchmetrics ``Metric`` classes, one per file."""

from lightning_sgd.metrics.gradient_gaussianity import GradientGaussianity
from lightning_sgd.metrics.noise_scale import GradientNoiseScale
from lightning_sgd.metrics.rank_me import RankMe
from lightning_sgd.metrics.tail_index import TailIndex
from lightning_sgd.metrics.weight_rank import WeightRank

__all__ = ["GradientGaussianity", "GradientNoiseScale", "RankMe", "TailIndex", "WeightRank"]
