"""Two decades of SGD research as PyTorch Lightning optimizers, strategies and callbacks.

Every public name is imported eagerly: LightningCLI finds ``MaSS`` by its bare name only when the class is
already imported, and ``lightning_sgd.MaSS`` is the spelling that ``--print_config`` writes back.

Each room lists its public names in its own ``__all__``; a new name is added there.
"""

from importlib.metadata import version

from lightning_sgd import (
    aggregation,
    callbacks,
    data,
    functional,
    lr_schedulers,
    metrics,
    models,
    optimizers,
    sampling,
    strategies,
)
from lightning_sgd._validation import NoEffectWarning, OutsideIntendedUseWarning
from lightning_sgd.aggregation import *
from lightning_sgd.callbacks import *
from lightning_sgd.data import *
from lightning_sgd.functional import *
from lightning_sgd.lr_schedulers import *
from lightning_sgd.metrics import *
from lightning_sgd.models import *
from lightning_sgd.optimizers import *
from lightning_sgd.sampling import *
from lightning_sgd.strategies import *

__version__ = version("lightning-sgd")

__all__ = ["NoEffectWarning", "OutsideIntendedUseWarning"]
__all__ += aggregation.__all__
__all__ += callbacks.__all__
__all__ += data.__all__
__all__ += functional.__all__
__all__ += lr_schedulers.__all__
__all__ += metrics.__all__
__all__ += models.__all__
__all__ += optimizers.__all__
__all__ += sampling.__all__
__all__ += strategies.__all__
