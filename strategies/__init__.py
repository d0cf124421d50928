"""Lightning strategies, one per file; hooks only, the arithmetic is in ``functional``.

Importing this package registers the names ``local_sgd`` and ``one_shot_averaging``, each also with ``_fork`` and
``_spawn``, and the names of the classes in lower case, which is what the Trainer makes of
``--trainer.strategy=LocalSGDStrategy``.
"""

from lightning_sgd.strategies._registry import register
from lightning_sgd.strategies.local_sgd import LocalSGDStrategy

register("local_sgd", LocalSGDStrategy)
register("localsgdstrategy", LocalSGDStrategy)
register("one_shot_averaging", LocalSGDStrategy, period=None, average="tail")

__all__ = ["LocalSGDStrategy"]
