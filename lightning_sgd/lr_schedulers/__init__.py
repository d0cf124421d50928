"""Learning-rate schedules, one per file."""

from lightning_sgd.lr_schedulers.biased_sgd import BiasedSGDLR
from lightning_sgd.lr_schedulers.diminishing import DiminishingLR

__all__ = ["BiasedSGDLR", "DiminishingLR"]
