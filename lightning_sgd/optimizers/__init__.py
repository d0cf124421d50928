"""Optimizers: ``torch.optim.Optimizer`` subclasses, one per file."""

from lightning_sgd.optimizers.mass import MaSS

__all__ = ["MaSS"]
