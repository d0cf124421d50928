"""Whether equal replicas are still equal, found out by a few bytes, and made so again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.pytorch.utilities import rank_zero_warn
from torch.optim import Optimizer

from lightning_sgd.functional.distributed.flat_gradients import short_hash
from lightning_sgd.functional.robust.robust_statistics import majority
from lightning_sgd.strategies._base.replica import put_back
from lightning_sgd.strategies._base.requirements import content
from lightning_sgd.strategies._comm.all_to_all import AllToAll
from lightning_sgd.strategies._comm.collectives import Purpose
from lightning_sgd.strategies._comm.failures import ExchangeError


def hash_of_weights(module: torch.nn.Module) -> int:
    """63 bits that change when any bit of a parameter does.

    Args:
        module: On any device.
    """
    return short_hash(b"".join(content(param) for param in module.parameters()))


def agree_on_weights(
    exchange: AllToAll,
    module: torch.nn.Module,
    optimizers: Sequence[Optimizer],
    step: int,
) -> list[int]:
    """Compare the weights of all ranks, and give those of the majority to the others.

    Args:
        exchange: Between the ranks.
        module: With its weights.
        optimizers: Train them; whoever gets weights gets their states too.
        step: Optimizer steps so far.

    Returns:
        Ranks that had other weights than the majority.

    Raises:
        ExchangeError: If no weights have a majority.
    """
    words = exchange.trade({}, {}, [hash_of_weights(module)], Purpose.WEIGHTS, step)
    prints = [number for number, _ in words]
    usual = majority(prints)
    if usual is None:
        raise ExchangeError(
            f"The ranks have different weights after step {step}, and none are those of a majority. Start again from "
            "the last checkpoint; different hardware or libraries may compute different bits."
        )
    strayed = [rank for rank, number in enumerate(prints) if number != usual]
    if strayed:
        rank_zero_warn(
            f"Ranks {strayed} had other weights than the majority after step {step}, and get theirs. Look at their "
            "memory, hardware and versions."
        )
        _copy_from(exchange, prints.index(usual), module, optimizers)
    return strayed


def _copy_from(
    exchange: AllToAll, source: int, module: torch.nn.Module, optimizers: Sequence[Optimizer]
) -> None:
    params = [param.detach() for param in module.parameters()]
    mine = {"params": params, "optimizers": [optimizer.state_dict() for optimizer in optimizers]}
    theirs = exchange.broadcast_object(move_data_to_device(mine, torch.device("cpu")), source)
    if exchange.rank == source:
        return
    put_back(params, theirs["params"])
    for optimizer, state in zip(optimizers, theirs["optimizers"], strict=True):
        optimizer.load_state_dict(state)
