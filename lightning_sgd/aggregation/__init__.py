"""Robust aggregation rules and attacks, as small objects that strategies compose."""

from lightning_sgd.aggregation._aggregator import (
    AggregationReport,
    Aggregator,
    CoordinateRule,
    GramRule,
)
from lightning_sgd.aggregation.clipping import CenteredClipping
from lightning_sgd.aggregation.composition import get_aggregator
from lightning_sgd.aggregation.coordinate import CoordinateMedian, MeaMed, Phocas, TrimmedMean
from lightning_sgd.aggregation.geometric import GeometricMedian
from lightning_sgd.aggregation.krum import Bulyan, Krum, MultiKrum
from lightning_sgd.aggregation.mean import Mean
from lightning_sgd.aggregation.nearest import CGE, FABA, MoNNA
from lightning_sgd.aggregation.pre_aggregated import PreAggregated
from lightning_sgd.aggregation.pre_aggregation import ARC, NNM, Bucketing, Clip, PreAggregator
from lightning_sgd.aggregation.spectral import DnC, SpectralFilter
from lightning_sgd.aggregation.subsets import MDA, SMEA

__all__ = [
    "ARC",
    "CGE",
    "FABA",
    "MDA",
    "NNM",
    "SMEA",
    "AggregationReport",
    "Aggregator",
    "Bucketing",
    "Bulyan",
    "CenteredClipping",
    "Clip",
    "CoordinateMedian",
    "CoordinateRule",
    "DnC",
    "GeometricMedian",
    "GramRule",
    "Krum",
    "MeaMed",
    "Mean",
    "MoNNA",
    "MultiKrum",
    "Phocas",
    "PreAggregated",
    "PreAggregator",
    "SpectralFilter",
    "TrimmedMean",
    "get_aggregator",
]
