"""Lightning callbacks, one per file or folder; the arithmetic is in ``functional``."""

from lightning_sgd.callbacks.byzantine_monitor import ByzantineMonitor
from lightning_sgd.callbacks.communication_monitor.communication_monitor import CommunicationMonitor
from lightning_sgd.callbacks.critical_batch_size_monitor import CriticalBatchSizeMonitor
from lightning_sgd.callbacks.gaussianity_monitor import GaussianityMonitor
from lightning_sgd.callbacks.gradient_error_monitor import GradientErrorMonitor
from lightning_sgd.callbacks.priority_sampling.priority_sampling import PrioritySampling
from lightning_sgd.callbacks.rank_monitor.rank_monitor import RankMonitor
from lightning_sgd.callbacks.tail_index_monitor import TailIndexMonitor
from lightning_sgd.callbacks.trajectory_regularization import TrajectoryRegularization

__all__ = [
    "ByzantineMonitor",
    "CommunicationMonitor",
    "CriticalBatchSizeMonitor",
    "GaussianityMonitor",
    "GradientErrorMonitor",
    "PrioritySampling",
    "RankMonitor",
    "TailIndexMonitor",
    "TrajectoryRegularization",
]
