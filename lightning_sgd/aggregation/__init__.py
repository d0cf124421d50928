"""Robust aggregation rules and attacks, as small objects that strategies compose."""

from lightning_sgd.aggregation._aggregator import (
    AggregationReport,
    Aggregator,
    CoordinateRule,
    GramRule,
)
from lightning_sgd.aggregation.composition import get_aggregator
from lightning_sgd.aggregation.coordinate import CoordinateMedian, TrimmedMean
from lightning_sgd.aggregation.mean import Mean
from lightning_sgd.aggregation.pre_aggregation import NNM, PreAggregated, PreAggregator
from lightning_sgd.aggregation.spectral import SpectralFilter

__all__ = [
    "NNM",
    "AggregationReport",
    "Aggregator",
    "CoordinateMedian",
    "CoordinateRule",
    "GramRule",
    "Mean",
    "PreAggregated",
    "PreAggregator",
    "SpectralFilter",
    "TrimmedMean",
    "get_aggregator",
]
