"""Two decades of SGD research as PyTorch Lightning optimizers, strategies and callbacks.

Every public name is imported eagerly: LightningCLI finds ``MaSS`` by its bare name only when the class is
already imported, and ``lightning_sgd.MaSS`` is the spelling that ``--print_config`` writes back.
"""

from importlib.metadata import version

from lightning_sgd._validation import NoEffectWarning, OutsideIntendedUseWarning
from lightning_sgd.aggregation import (
    ALIE,
    ARC,
    CGE,
    FABA,
    IPM,
    MDA,
    NNM,
    SMEA,
    AggregationReport,
    Aggregator,
    Attack,
    BitFlip,
    Bucketing,
    Bulyan,
    CenteredClipping,
    Clip,
    ConstantAttack,
    CoordinateMedian,
    CoordinateRule,
    DnC,
    GaussianAttack,
    GeometricMedian,
    GramRule,
    Krum,
    LabelFlip,
    MeaMed,
    Mean,
    Mimic,
    MinMax,
    MoNNA,
    MultiKrum,
    NonFinite,
    OptimalFactor,
    Phocas,
    PreAggregated,
    PreAggregator,
    SignFlip,
    SpectralFilter,
    TrimmedMean,
    get_aggregator,
)
from lightning_sgd.callbacks import (
    ByzantineMonitor,
    CommunicationMonitor,
    GradientErrorMonitor,
    PrioritySampling,
    RankMonitor,
    TailIndexMonitor,
    TrajectoryRegularization,
)
from lightning_sgd.data.digits import DigitsDataModule
from lightning_sgd.data.effective_batch import effective_batch_size
from lightning_sgd.data.resumable import ResumableDataLoader
from lightning_sgd.functional.biased_sgd import (
    BiasedSGDProblem,
    StepBound,
    biased_sgd_step_bound,
)
from lightning_sgd.functional.biased_sgd_plan import (
    biased_sgd_bound,
    biased_sgd_floor,
    max_relative_error,
    optimal_step,
)
from lightning_sgd.functional.biased_sgd_sdp import biased_sgd_sdp
from lightning_sgd.functional.condition_numbers import ConditionNumbers, estimate_condition_numbers
from lightning_sgd.functional.gradient_error import fit_error_model
from lightning_sgd.functional.hogwild import diminishing_bound
from lightning_sgd.functional.mass_theory import (
    MaSSHyperParameters,
    batch_size_regime,
    critical_batch_sizes,
    mass_hyperparameters,
)
from lightning_sgd.functional.mixing import Mixing
from lightning_sgd.functional.partition import partition_by_label
from lightning_sgd.functional.rank_collapse import spectral_stats
from lightning_sgd.functional.stable_law import sample_stable
from lightning_sgd.functional.tail_estimators import (
    dedh_tail_index,
    ecf_tail_index,
    hill_tail_index,
    mcculloch_tail_index,
    pickands_tail_index,
)
from lightning_sgd.functional.tail_index import (
    TailIndexResult,
    dyadic_tail_index,
    log_moment_tail_index,
)
from lightning_sgd.functional.topologies import (
    Complete,
    Exponential,
    FromGraph,
    Hypercube,
    OnePeerExponential,
    Ring,
    Topology,
    Torus,
)
from lightning_sgd.lr_schedulers import BiasedSGDLR, DiminishingLR
from lightning_sgd.metrics import RankMe, TailIndex, WeightRank
from lightning_sgd.models.digits import DigitsClassifier
from lightning_sgd.optimizers import TRSGD, MaSS, NovoGrad, TRAdam
from lightning_sgd.sampling import (
    InBatchSelection,
    Presampling,
    PriorityBatchSampler,
    PrioritySampler,
    SumTree,
    priority_mean,
)
from lightning_sgd.strategies import (
    ByzantineStrategy,
    GossipPGAStrategy,
    LocalSGDStrategy,
    OverlapLocalSGDStrategy,
)

__version__ = version("lightning-sgd")

__all__ = [
    "ALIE",
    "ARC",
    "CGE",
    "FABA",
    "IPM",
    "MDA",
    "NNM",
    "SMEA",
    "TRSGD",
    "AggregationReport",
    "Aggregator",
    "Attack",
    "BiasedSGDLR",
    "BiasedSGDProblem",
    "BitFlip",
    "Bucketing",
    "Bulyan",
    "ByzantineMonitor",
    "ByzantineStrategy",
    "CenteredClipping",
    "Clip",
    "CommunicationMonitor",
    "Complete",
    "ConditionNumbers",
    "ConstantAttack",
    "CoordinateMedian",
    "CoordinateRule",
    "DigitsClassifier",
    "DigitsDataModule",
    "DiminishingLR",
    "DnC",
    "Exponential",
    "FromGraph",
    "GaussianAttack",
    "GeometricMedian",
    "GossipPGAStrategy",
    "GradientErrorMonitor",
    "GramRule",
    "Hypercube",
    "InBatchSelection",
    "Krum",
    "LabelFlip",
    "LocalSGDStrategy",
    "MaSS",
    "MaSSHyperParameters",
    "MeaMed",
    "Mean",
    "Mimic",
    "MinMax",
    "Mixing",
    "MoNNA",
    "MultiKrum",
    "NoEffectWarning",
    "NonFinite",
    "NovoGrad",
    "OnePeerExponential",
    "OptimalFactor",
    "OutsideIntendedUseWarning",
    "OverlapLocalSGDStrategy",
    "Phocas",
    "PreAggregated",
    "PreAggregator",
    "Presampling",
    "PriorityBatchSampler",
    "PrioritySampler",
    "PrioritySampling",
    "RankMe",
    "RankMonitor",
    "ResumableDataLoader",
    "Ring",
    "SignFlip",
    "SpectralFilter",
    "StepBound",
    "SumTree",
    "TRAdam",
    "TailIndex",
    "TailIndexMonitor",
    "TailIndexResult",
    "Topology",
    "Torus",
    "TrajectoryRegularization",
    "TrimmedMean",
    "WeightRank",
    "batch_size_regime",
    "biased_sgd_bound",
    "biased_sgd_floor",
    "biased_sgd_sdp",
    "biased_sgd_step_bound",
    "critical_batch_sizes",
    "dedh_tail_index",
    "diminishing_bound",
    "dyadic_tail_index",
    "ecf_tail_index",
    "effective_batch_size",
    "estimate_condition_numbers",
    "fit_error_model",
    "get_aggregator",
    "hill_tail_index",
    "log_moment_tail_index",
    "mass_hyperparameters",
    "max_relative_error",
    "mcculloch_tail_index",
    "optimal_step",
    "partition_by_label",
    "pickands_tail_index",
    "priority_mean",
    "sample_stable",
    "spectral_stats",
]
