"""Samplers that decide which example comes next."""

from lightning_sgd.sampling.loss_recorder import priority_mean
from lightning_sgd.sampling.priority_sampler import PriorityBatchSampler, PrioritySampler
from lightning_sgd.sampling.selection import InBatchSelection, Presampling
from lightning_sgd.sampling.sum_tree import SumTree

__all__ = [
    "InBatchSelection",
    "Presampling",
    "PriorityBatchSampler",
    "PrioritySampler",
    "SumTree",
    "priority_mean",
]
