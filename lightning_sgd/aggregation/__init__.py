"""Robust aggregation rules and attacks, as small objects that strategies compose."""

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
