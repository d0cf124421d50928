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
    CriticalBatchSizeMonitor,
    GaussianityMonitor,
    GradientErrorMonitor,
    PrioritySampling,
    RankMonitor,
    TailIndexMonitor,
    TrajectoryRegularization,
)
from lightning_sgd.data.digits import DigitsDataModule
from lightning_sgd.data.effective_batch import effective_batch_size
from lightning_sgd.data.resumable import ResumableDataLoader
from lightning_sgd.functional.distributed.mixing import Mixing
from lightning_sgd.functional.distributed.topologies import (
    Complete,
    Exponential,
    FromGraph,
    Hypercube,
    OnePeerExponential,
    Ring,
    Topology,
    Torus,
)
from lightning_sgd.functional.noise.gaussian_null import DirectionTests
from lightning_sgd.functional.noise.gaussianity_settings import GaussianitySettings
from lightning_sgd.functional.noise.gradient_gaussianity import (
    GaussianityResult,
    gradient_gaussianity,
)
from lightning_sgd.functional.noise.gram_projections import effective_dimension, gram_projections
from lightning_sgd.functional.noise.noise_scale import NoiseScale
from lightning_sgd.functional.noise.normality_tests import (
    NormalityTest,
    anderson_darling,
    jarque_bera,
    shapiro_wilk,
)
from lightning_sgd.functional.noise.stable_law import sample_stable
from lightning_sgd.functional.noise.tail_estimators import (
    dedh_tail_index,
    ecf_tail_index,
    hill_tail_index,
    mcculloch_tail_index,
    pickands_tail_index,
)
from lightning_sgd.functional.noise.tail_index import (
    TailIndexResult,
    dyadic_tail_index,
    log_moment_tail_index,
)
from lightning_sgd.functional.optim.mass_theory import (
    MaSSHyperParameters,
    batch_size_regime,
    critical_batch_sizes,
    mass_hyperparameters,
)
from lightning_sgd.functional.partition import partition_by_label
from lightning_sgd.functional.spectra.rank_collapse import spectral_stats
from lightning_sgd.functional.step_size.biased_sgd import (
    BiasedSGDProblem,
    StepBound,
    biased_sgd_step_bound,
)
from lightning_sgd.functional.step_size.biased_sgd_plan import (
    biased_sgd_bound,
    biased_sgd_floor,
    biased_sgd_sdp,
    max_relative_error,
    optimal_step,
)
from lightning_sgd.functional.step_size.compression import fit_error_model
from lightning_sgd.functional.step_size.diminishing import diminishing_bound
from lightning_sgd.functional.step_size.least_squares import (
    ConditionNumbers,
    LeastSquaresConstants,
    critical_batch_size,
    estimate_condition_numbers,
    least_squares_constants,
    max_learning_rate,
)
from lightning_sgd.lr_schedulers import BiasedSGDLR, DiminishingLR
from lightning_sgd.metrics import (
    GradientGaussianity,
    GradientNoiseScale,
    RankMe,
    TailIndex,
    WeightRank,
)
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
    "CriticalBatchSizeMonitor",
    "DigitsClassifier",
    "DigitsDataModule",
    "DiminishingLR",
    "DirectionTests",
    "DnC",
    "Exponential",
    "FromGraph",
    "GaussianAttack",
    "GaussianityMonitor",
    "GaussianityResult",
    "GaussianitySettings",
    "GeometricMedian",
    "GossipPGAStrategy",
    "GradientErrorMonitor",
    "GradientGaussianity",
    "GradientNoiseScale",
    "GramRule",
    "Hypercube",
    "InBatchSelection",
    "Krum",
    "LabelFlip",
    "LeastSquaresConstants",
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
    "NoiseScale",
    "NonFinite",
    "NormalityTest",
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
    "anderson_darling",
    "batch_size_regime",
    "biased_sgd_bound",
    "biased_sgd_floor",
    "biased_sgd_sdp",
    "biased_sgd_step_bound",
    "critical_batch_size",
    "critical_batch_sizes",
    "dedh_tail_index",
    "diminishing_bound",
    "dyadic_tail_index",
    "ecf_tail_index",
    "effective_batch_size",
    "effective_dimension",
    "estimate_condition_numbers",
    "fit_error_model",
    "get_aggregator",
    "gradient_gaussianity",
    "gram_projections",
    "hill_tail_index",
    "jarque_bera",
    "least_squares_constants",
    "log_moment_tail_index",
    "mass_hyperparameters",
    "max_learning_rate",
    "max_relative_error",
    "mcculloch_tail_index",
    "optimal_step",
    "partition_by_label",
    "pickands_tail_index",
    "priority_mean",
    "sample_stable",
    "shapiro_wilk",
    "spectral_stats",
]
