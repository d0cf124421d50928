"""Optimizers: ``torch.optim.Optimizer`` subclasses, one per file."""

from lightning_sgd.optimizers.mass import MaSS
from lightning_sgd.optimizers.novograd import NovoGrad
from lightning_sgd.optimizers.tra import TRSGD, TRAdam

__all__ = ["TRSGD", "MaSS", "NovoGrad", "TRAdam"]
