"""Robust aggregation rules and attacks, as small objects that strategies compose.

Many published methods are a pre-aggregation, a rule and a setting of the strategy:

- SpectralFilter(stop="threshold"): Data & Diggavi, ISIT 2021, with a simpler decoder than theirs.
- SpectralFilter(stop="agnostic"): CAF, Allouah et al., ICML 2025.
- SpectralFilter(stop="threshold", mode="hard"): a randomised filter, after Diakonikolas et al., FOCS 2016.
- GeometricMedian(smoothing=0.1, num_iterations=3, start="zero"): RFA, Pillutla et al., 2022, as other libraries run it.
- CenteredClipping with worker momentum: Karimireddy et al., ICML 2021.
- Bucketing + Krum, GeometricMedian, CoordinateMedian or CenteredClipping, with worker momentum: Karimireddy et al.,
  ICLR 2022.
- MDA, or another rule of bounded error, with worker momentum: RESAM, Farhadkhani et al., ICML 2022.
- NNM + TrimmedMean, CoordinateMedian, Krum or GeometricMedian, with worker momentum: "Fixing by Mixing", Allouah et
  al., AISTATS 2023.
- ARC + NNM + the same rules: Allouah et al., ICLR 2025.
- MultiKrum(num_selected=1): Krum. Repeated Krum, then MeaMed on the chosen rows: Bulyan.
- MinMax(by_sum=True): the attack min-sum. OptimalFactor(rule, "ipm"): fall of empires with the best factor.

Worker momentum is ``worker_momentum`` of :class:`~lightning_sgd.ByzantineStrategy`. ``docs/aggregation.md`` says where
ours differ from the papers.
"""

from lightning_sgd.aggregation._aggregator import (
    AggregationReport,
    Aggregator,
    CoordinateRule,
    GramRule,
)
from lightning_sgd.aggregation._attack import Attack
from lightning_sgd.aggregation.attacks import ALIE, IPM, MinMax, OptimalFactor, SignFlip
from lightning_sgd.aggregation.clipping import CenteredClipping
from lightning_sgd.aggregation.composition import get_aggregator
from lightning_sgd.aggregation.coordinate import CoordinateMedian, MeaMed, Phocas, TrimmedMean
from lightning_sgd.aggregation.faults import (
    BitFlip,
    ConstantAttack,
    GaussianAttack,
    LabelFlip,
    NonFinite,
)
from lightning_sgd.aggregation.geometric import GeometricMedian
from lightning_sgd.aggregation.krum import Bulyan, Krum, MultiKrum
from lightning_sgd.aggregation.mean import Mean
from lightning_sgd.aggregation.mimic import Mimic
from lightning_sgd.aggregation.nearest import CGE, FABA, MoNNA
from lightning_sgd.aggregation.pre_aggregated import PreAggregated
from lightning_sgd.aggregation.pre_aggregation import ARC, NNM, Bucketing, Clip, PreAggregator
from lightning_sgd.aggregation.spectral import DnC, SpectralFilter
from lightning_sgd.aggregation.subsets import MDA, SMEA

__all__ = [
    "ALIE",
    "ARC",
    "CGE",
    "FABA",
    "IPM",
    "MDA",
    "NNM",
    "SMEA",
    "AggregationReport",
    "Aggregator",
    "Attack",
    "BitFlip",
    "Bucketing",
    "Bulyan",
    "CenteredClipping",
    "Clip",
    "ConstantAttack",
    "CoordinateMedian",
    "CoordinateRule",
    "DnC",
    "GaussianAttack",
    "GeometricMedian",
    "GramRule",
    "Krum",
    "LabelFlip",
    "MeaMed",
    "Mean",
    "Mimic",
    "MinMax",
    "MoNNA",
    "MultiKrum",
    "NonFinite",
    "OptimalFactor",
    "Phocas",
    "PreAggregated",
    "PreAggregator",
    "SignFlip",
    "SpectralFilter",
    "TrimmedMean",
    "get_aggregator",
]
