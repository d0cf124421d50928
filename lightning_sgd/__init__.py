"""Two decades of SGD research as PyTorch Lightning optimizers, strategies and callbacks.

Every public name is imported eagerly: LightningCLI finds ``MaSS`` by its bare name only when the class is
already imported, and ``lightning_sgd.MaSS`` is the spelling that ``--print_config`` writes back.
"""

from importlib.metadata import version

from lightning_sgd._validation import NoEffectWarning, OutsideIntendedUseWarning
from lightning_sgd.callbacks import RankMonitor
from lightning_sgd.data.digits import DigitsDataModule
from lightning_sgd.data.effective_batch import effective_batch_size
from lightning_sgd.data.resumable import ResumableDataLoader
from lightning_sgd.functional.condition_numbers import ConditionNumbers, estimate_condition_numbers
from lightning_sgd.functional.mass_theory import (
    MaSSHyperParameters,
    batch_size_regime,
    critical_batch_sizes,
    mass_hyperparameters,
)
from lightning_sgd.functional.mixing import Mixing
from lightning_sgd.functional.partition import partition_by_label
from lightning_sgd.functional.rank_collapse import spectral_stats
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
from lightning_sgd.metrics import RankMe, WeightRank
from lightning_sgd.models.digits import DigitsClassifier
from lightning_sgd.optimizers import MaSS
from lightning_sgd.strategies import GossipPGAStrategy, LocalSGDStrategy, OverlapLocalSGDStrategy

__version__ = version("lightning-sgd")

__all__ = [
    "Complete",
    "ConditionNumbers",
    "DigitsClassifier",
    "DigitsDataModule",
    "Exponential",
    "FromGraph",
    "GossipPGAStrategy",
    "Hypercube",
    "LocalSGDStrategy",
    "MaSS",
    "MaSSHyperParameters",
    "Mixing",
    "NoEffectWarning",
    "OnePeerExponential",
    "OutsideIntendedUseWarning",
    "OverlapLocalSGDStrategy",
    "RankMe",
    "RankMonitor",
    "ResumableDataLoader",
    "Ring",
    "Topology",
    "Torus",
    "WeightRank",
    "batch_size_regime",
    "critical_batch_sizes",
    "effective_batch_size",
    "estimate_condition_numbers",
    "mass_hyperparameters",
    "partition_by_label",
    "spectral_stats",
]
