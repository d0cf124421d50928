"""LightningModules to train on, one per file."""

from lightning_sgd.models.digits import DigitsClassifier

__all__ = ["DigitsClassifier"]
