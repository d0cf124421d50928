"""Samplers that decide which example comes next."""

from lightning_sgd.sampling.draw import Draw
from lightning_sgd.sampling.loss_recorder import priority_mean
from lightning_sgd.sampling.priority_loader import PriorityDataLoader
from lightning_sgd.sampling.priority_sampler import PriorityBatchSampler, PrioritySampler
from lightning_sgd.sampling.selection import InBatchSelection, Presampling, Selection
from lightning_sgd.sampling.sum_tree import SumTree

__all__ = [
    "Draw",
    "InBatchSelection",
    "Presampling",
    "PriorityBatchSampler",
    "PriorityDataLoader",
    "PrioritySampler",
    "Selection",
    "SumTree",
    "priority_mean",
]
