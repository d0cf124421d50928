"""Samplers that decide which example comes next."""

from lightning_sgd.sampling.sum_tree import SumTree

__all__ = ["SumTree"]
