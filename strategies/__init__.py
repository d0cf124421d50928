"""Lightning strategies, one file or folder per method; the arithmetic is in ``functional``.

Importing this package registers the names ``local_sgd``, ``one_shot_averaging``, ``gossip_pga``, ``gossip_aga``,
``gossip``, ``overlap_local_sgd`` and ``byzantine``, each also with ``_fork`` and ``_spawn``, and the names of the
classes in lower case, which is what the Trainer makes of ``--trainer.strategy=LocalSGDStrategy``.
"""

from typing import Any

from lightning.pytorch.strategies import Strategy, StrategyRegistry

from lightning_sgd.strategies.byzantine.byzantine import ByzantineStrategy
from lightning_sgd.strategies.gossip_pga import GossipPGAStrategy
from lightning_sgd.strategies.local_sgd import LocalSGDStrategy
from lightning_sgd.strategies.overlap_local_sgd import OverlapLocalSGDStrategy

__all__ = [
    "ByzantineStrategy",
    "GossipPGAStrategy",
    "LocalSGDStrategy",
    "OverlapLocalSGDStrategy",
]


def _register(name: str, strategy: type[Strategy], **settings: Any) -> None:
    """Register a strategy as ``name``, ``<name>_fork`` and ``<name>_spawn``.

    The name is in lower case, because the Trainer looks it up in lower case.
    """
    for method in "popen", "fork", "spawn":
        key = name if method == "popen" else f"{name}_{method}"
        if key not in StrategyRegistry:
            description = f"{strategy.__name__} with start_method '{method}'"
            settings = {**settings, "start_method": method}
            StrategyRegistry.register(key, strategy, description=description, **settings)


_register("local_sgd", LocalSGDStrategy)
_register("localsgdstrategy", LocalSGDStrategy)
_register("one_shot_averaging", LocalSGDStrategy, period=None, average="tail")
_register("gossip_pga", GossipPGAStrategy)
_register("gossippgastrategy", GossipPGAStrategy)
_register("gossip_aga", GossipPGAStrategy, adaptive=True, period=4)
_register("gossip", GossipPGAStrategy, period=None)
_register("overlap_local_sgd", OverlapLocalSGDStrategy)
_register("overlaplocalsgdstrategy", OverlapLocalSGDStrategy)
_register("byzantine", ByzantineStrategy)
_register("byzantinestrategy", ByzantineStrategy)
