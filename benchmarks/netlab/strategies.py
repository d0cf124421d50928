"""The strategies that are compared, one per line of the table."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

from lightning.pytorch.strategies import DDPStrategy, Strategy
from torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook import (
    PostLocalSGDState,
    post_localSGD_hook,
)

import lightning_sgd

TIMEOUT = timedelta(seconds=60)


def ddp() -> Strategy:
    """Return Lightning's DDP."""
    return DDPStrategy(timeout=TIMEOUT)


def post_local_sgd() -> Strategy:
    """Return Lightning's post-local SGD; on a CPU Lightning drops its hook, and gradients are averaged all the same."""
    state = PostLocalSGDState(process_group=None, subgroup=None, start_localSGD_iter=0)
    return DDPStrategy(
        ddp_comm_state=state,
        ddp_comm_hook=post_localSGD_hook,
        model_averaging_period=4,
        timeout=TIMEOUT,
    )


def ours(name: str, **settings: Any) -> Callable[[], Strategy]:
    """Return a strategy of the package that leaves SIGTERM to the launcher."""

    def make() -> Strategy:
        strategy: Strategy = getattr(lightning_sgd, name)(
            **settings, sigterm_every_n_batches=0, timeout=TIMEOUT
        )
        return strategy

    make.__name__ = name
    return make


LINES: dict[str, Callable[[], Strategy]] = {
    "no exchange": ours("LocalSGDStrategy", period=None),
    "DDP": ddp,
    "post-local SGD of Lightning, H = 4": post_local_sgd,
    "Local SGD, H = 1": ours("LocalSGDStrategy", period=1),
    "Local SGD, H = 4": ours("LocalSGDStrategy", period=4),
    "Local SGD, H = 16": ours("LocalSGDStrategy", period=16),
    "Byzantine, filter": ours("ByzantineStrategy", num_byzantine=1),
    "gossip, one peer": ours("GossipPGAStrategy", period=None),
    "gossip, ring": ours("GossipPGAStrategy", topology="ring", period=None),
    "Gossip-PGA, H = 8": ours("GossipPGAStrategy", period=8),
    "Gossip-AGA": ours("GossipPGAStrategy", adaptive=True, period=4),
    "Overlap Local-SGD, H = 2": ours("OverlapLocalSGDStrategy", period=2, lr_compensation=True),
    "Overlap Local-SGD, H = 8": ours("OverlapLocalSGDStrategy", period=8, lr_compensation=True),
}
QUICK = ("DDP", "Local SGD, H = 4")
