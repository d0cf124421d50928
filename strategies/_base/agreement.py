"""Compare the weights of all ranks by fingerprints, at the start and during training."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_sgd._validation import Words, expect
from lightning_sgd.functional.robust.robust_statistics import majority
from lightning_sgd.strategies._base.replica import copy_all_
from lightning_sgd.strategies._comm.all_to_all import AllToAll
from lightning_sgd.strategies._comm.collectives import Collectives, Purpose
from lightning_sgd.strategies._comm.failures import ExchangeError
from lightning_sgd.strategies._comm.fingerprints import fingerprint, layout


def verify_equal_weights(exchange: Collectives, module: torch.nn.Module) -> None:
    """Raise if ranks start from different parameters or buffers, by a few bytes each."""
    state = module.state_dict().values()
    mine = fingerprint(value for value in state if isinstance(value, Tensor))
    prints = exchange.all_gather_object(mine)
    others = [rank for rank, print_ in enumerate(prints) if print_ != prints[0]]
    remedy = "Call `seed_everything` before the model is made, or set initial_weights='broadcast'."
    got = Words(f"others on ranks {others}")
    expect(not others, "initial_weights", "the same on all ranks", got, remedy)


def verify_equal_layouts(exchange: Collectives, named: Sequence[tuple[str, Tensor]]) -> None:
    """Raise if ranks have tensors of other names, shapes, types or order, whose elements would be mixed up."""
    prints = exchange.all_gather_object(layout(named))
    others = [rank for rank, print_ in enumerate(prints) if print_ != prints[0]]
    if not others:
        return
    mine = [f"{name} {tuple(tensor.shape)} {tensor.dtype}" for name, tensor in named]
    layouts = exchange.all_gather_object(mine)
    pairs = zip_longest(layouts[0], layouts[others[0]], fillvalue="nothing")
    here, there = next((a, b) for a, b in pairs if a != b)
    remedy = "Build it from the same settings, in the same order and precision, on every rank."
    got = Words(f"others on ranks {others}: {there} on rank {others[0]}, {here} on rank 0")
    expect(False, "model", "of the same tensors on all ranks", got, remedy)


def agree_on_weights(
    exchange: AllToAll,
    module: torch.nn.Module,
    optimizers: Sequence[Optimizer],
    step: int,
) -> list[int]:
    """Compare the weights of all ranks, and give those of the majority to the others.

    Args:
        exchange: Connects all ranks, which must call this together.
        module: Its parameters are compared.
        optimizers: Their states are sent along with the weights.
        step: Optimizer steps so far.

    Returns:
        Ranks that had other weights than the majority.

    Raises:
        ExchangeError: If no weights have a majority.
    """
    metadata = exchange.all_to_all(
        {}, {}, [fingerprint(module.parameters())], Purpose.WEIGHTS, step
    )
    prints = [number for number, _ in metadata]
    usual = majority(prints)
    if usual is None:
        raise ExchangeError(
            f"The ranks have different weights after step {step}, and none are those of a majority. Start again from "
            "the last checkpoint; different hardware or libraries may compute different bits."
        )
    diverged = [rank for rank, number in enumerate(prints) if number != usual]
    if diverged:
        rank_zero_warn(
            f"Ranks {diverged} had other weights than the majority after step {step}, and get theirs. Look at their "
            "memory, hardware and versions."
        )
        _copy_from(exchange, prints.index(usual), module, optimizers)
    return diverged


def _copy_from(
    exchange: AllToAll, source: int, module: torch.nn.Module, optimizers: Sequence[Optimizer]
) -> None:
    params = [param.detach() for param in module.parameters()]
    mine = {"params": params, "optimizers": [optimizer.state_dict() for optimizer in optimizers]}
    theirs = exchange.broadcast_object(move_data_to_device(mine, torch.device("cpu")), source)
    if exchange.rank == source:
        return
    copy_all_(params, theirs["params"])
    for optimizer, state in zip(optimizers, theirs["optimizers"], strict=True):
        optimizer.load_state_dict(state)
