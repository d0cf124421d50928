"""The mathematics: tensors in, tensors out. Knows nothing of Lightning.

The names here are public as ``lightning_sgd.<name>`` too; everything else is imported from its subject.
"""

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
from lightning_sgd.functional.noise.gradient_gaussianity import (
    GaussianityResult,
    GaussianitySettings,
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
from lightning_sgd.functional.noise.tail_estimators import (
    dedh_tail_index,
    ecf_tail_index,
    hill_tail_index,
    mcculloch_tail_index,
    pickands_tail_index,
    sample_stable,
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
from lightning_sgd.functional.spectra.spectral_stats import spectral_stats
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

__all__ = [
    "BiasedSGDProblem",
    "Complete",
    "ConditionNumbers",
    "DirectionTests",
    "Exponential",
    "FromGraph",
    "GaussianityResult",
    "GaussianitySettings",
    "Hypercube",
    "LeastSquaresConstants",
    "MaSSHyperParameters",
    "Mixing",
    "NoiseScale",
    "NormalityTest",
    "OnePeerExponential",
    "Ring",
    "StepBound",
    "TailIndexResult",
    "Topology",
    "Torus",
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
    "effective_dimension",
    "estimate_condition_numbers",
    "fit_error_model",
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
    "sample_stable",
    "shapiro_wilk",
    "spectral_stats",
]
