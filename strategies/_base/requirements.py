"""Refuse before training what strategies without a wrapper cannot be combined with."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from lightning.pytorch.strategies import DDPStrategy
from torch.nn import SyncBatchNorm
from torch.nn.parameter import is_lazy

from lightning_sgd._validation import Words, expect

# By name: importing them takes longer than importing this package.
WRAPPERS = ("FullyShardedDataParallel", "DistributedDataParallel", "DeepSpeedEngine")
OPTIMIZERS = ("PostLocalSGDOptimizer", "ZeroRedundancyOptimizer", "DistributedOptimizer")

ONE_GRADIENT = (
    "Ranks that evaluate it a different number of times would wait for each other. Use an optimizer such as SGD or "
    "Adam, or DDPStrategy."
)

RUN_ONE_BATCH = "Run one batch through the module in its constructor, under `torch.no_grad()`."


def refuse_unsupported(strategy: DDPStrategy, against_sync_batchnorm: str) -> None:
    """Raise if module, optimizers or trainer communicate by themselves, or steps take several gradients."""
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
        against_sync_batchnorm,
    )
    wrapped = _named(parts, WRAPPERS)
    remedy = f"{name} needs every rank to hold the whole module, unwrapped."
    expect(not wrapped, "model", "a plain module", wrapped, remedy)
    lazy = [key for key, tensor in _named_tensors(module) if is_lazy(tensor)]
    expected = "without lazy parameters on several ranks, which must start from the same"
    expect(not lazy or strategy.world_size == 1, "model", expected, lazy[:3], RUN_ONE_BATCH)
    sharded = _named(module.parameters(), ("DTensor",))
    expect(not sharded, "model", "made of plain tensors", sharded[:3], remedy)
    distributed = _named(strategy.optimizers, OPTIMIZERS)
    remedy = "Use the optimizer inside it; the strategy exchanges what is needed."
    expect(not distributed, "configure_optimizers", "of plain optimizers", distributed, remedy)
    # A line search evaluates the closure as often as the data of a rank demand.
    repeated = [o for o in strategy.optimizers if isinstance(o, torch.optim.LBFGS)]
    got = Words(", ".join(type(optimizer).__name__ for optimizer in repeated))
    expected = f"of optimizers that evaluate their closure once per step with {name}"
    expect(not repeated, "configure_optimizers", expected, got, ONE_GRADIENT)


def _named_tensors(module: torch.nn.Module) -> Iterable[tuple[str, torch.Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _named(things: Iterable[object], names: Sequence[str]) -> list[str]:
    return [type(thing).__name__ for thing in things if type(thing).__name__ in names]
