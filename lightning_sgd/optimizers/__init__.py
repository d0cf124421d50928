"""Optimizers: ``torch.optim.Optimizer`` subclasses, one per file."""

from lightning_sgd.optimizers.mass import MaSS
from lightning_sgd.optimizers.novograd import NovoGrad

__all__ = ["MaSS", "NovoGrad"]
