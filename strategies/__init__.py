"""Lightning strategies, one per file; hooks only, the arithmetic is in ``functional``.

Importing this package registers the names ``local_sgd``, ``one_shot_averaging``, ``gossip_pga``, ``gossip_aga``,
``gossip``, ``overlap_local_sgd`` and ``byzantine``, each also with ``_fork`` and ``_spawn``, and the names of the
classes in lower case, which is what the Trainer makes of ``--trainer.strategy=LocalSGDStrategy``.
"""

from lightning_sgd.strategies._registry import register
from lightning_sgd.strategies.byzantine.byzantine import ByzantineStrategy
from lightning_sgd.strategies.gossip_pga import GossipPGAStrategy
from lightning_sgd.strategies.local_sgd import LocalSGDStrategy
from lightning_sgd.strategies.overlap_local_sgd import OverlapLocalSGDStrategy

register("local_sgd", LocalSGDStrategy)
register("localsgdstrategy", LocalSGDStrategy)
register("one_shot_averaging", LocalSGDStrategy, period=None, average="tail")
register("gossip_pga", GossipPGAStrategy)
register("gossippgastrategy", GossipPGAStrategy)
register("gossip_aga", GossipPGAStrategy, adaptive=True, period=4)
register("gossip", GossipPGAStrategy, period=None)
register("overlap_local_sgd", OverlapLocalSGDStrategy)
register("overlaplocalsgdstrategy", OverlapLocalSGDStrategy)
register("byzantine", ByzantineStrategy)
register("byzantinestrategy", ByzantineStrategy)

__all__ = [
    "ByzantineStrategy",
    "GossipPGAStrategy",
    "LocalSGDStrategy",
    "OverlapLocalSGDStrategy",
]
