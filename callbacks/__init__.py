"""Lightning callbacks, one per file; hooks only, the arithmetic is in ``functional``."""

from lightning_sgd.callbacks.rank_monitor import RankMonitor

__all__ = ["RankMonitor"]
