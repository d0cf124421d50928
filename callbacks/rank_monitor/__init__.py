"""Monitor the rank of weight matrices."""

from lightning_sgd.callbacks.rank_monitor.rank_monitor import RankMonitor

__all__ = ["RankMonitor"]
