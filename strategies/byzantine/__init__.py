"""Combine gradients so that a few wrong ranks do not matter."""

from lightning_sgd.strategies.byzantine.byzantine import ByzantineStrategy

__all__ = ["ByzantineStrategy"]
