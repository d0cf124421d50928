"""What strategies without a wrapper cannot be combined with, said before training starts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.nn import SyncBatchNorm

from lightning_sgd._validation import expect

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from lightning_sgd.strategies._base.unwrapped import UnwrappedStrategy

# By name: importing them takes longer than importing this package.
WRAPPERS = ("FullyShardedDataParallel", "DistributedDataParallel", "DeepSpeedEngine")
OPTIMIZERS = ("PostLocalSGDOptimizer", "ZeroRedundancyOptimizer", "DistributedOptimizer")


def refuse_unsupported(strategy: UnwrappedStrategy) -> None:
    """Raise if module, optimizers or Trainer are set up to exchange something themselves.

    Args:
        strategy: Connected to its module.
    """
    name = type(strategy).__name__
    module = strategy.lightning_module
    assert module is not None
    parts = list(module.modules())
    norms = [part for part in parts if isinstance(part, SyncBatchNorm)]
    expect(
        strategy._layer_sync is None and not norms,
        "sync_batchnorm",
        f"False with {name}",
        True,
        strategy.against_sync_batchnorm,
    )
    wrapped = _named(parts, WRAPPERS)
    remedy = f"{name} needs every rank to hold the whole module, unwrapped."
    expect(not wrapped, "model", "a plain module", wrapped, remedy)
    sharded = _named(module.parameters(), ("DTensor",))
    expect(not sharded, "model", "made of plain tensors", sharded[:3], remedy)
    distributed = _named(strategy.optimizers, OPTIMIZERS)
    remedy = "Use the optimizer inside it; the strategy exchanges what is needed."
    expect(not distributed, "configure_optimizers", "of plain optimizers", distributed, remedy)


def _named(things: Iterable[object], names: Sequence[str]) -> list[str]:
    return [type(thing).__name__ for thing in things if type(thing).__name__ in names]
