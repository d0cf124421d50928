"""Checkpoints of a training in which every rank has a model of its own.

The file is an ordinary one: ``state_dict`` is the mean of the models, the rest is that of rank 0. One more key,
``lightning_sgd``, holds for every rank what it would have written alone. At the start of a fit each rank gets that
back, so that it goes on exactly where it was; everything else reads the mean.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_sgd.functional.distributed.flat_buffers import FlatBuffers
from lightning_sgd.strategies._comm.collectives import Collectives, Purpose

KEY = "lightning_sgd"
VERSION = 1
SAME_ON_ALL_RANKS = ("epoch", "global_step", "pytorch-lightning_version")

Checkpoint: TypeAlias = dict[str, Any]


def rank_part(checkpoint: Mapping[str, Any], state: Mapping[str, Any]) -> Checkpoint:
    """What a rank keeps of its own, on the CPU.

    Args:
        checkpoint: As Lightning would write it for this rank, with this rank's weights.
        state: The strategy's own.
    """
    own = {
        key: value
        for key, value in checkpoint.items()
        if key not in SAME_ON_ALL_RANKS and not key.startswith(("hparams", "hyper", "datamodule_"))
    }
    part: Checkpoint = move_data_to_device({**own, KEY: state}, torch.device("cpu"))
    return part


def with_ranks(
    checkpoint: Checkpoint,
    parts: Sequence[Checkpoint],
    num_ranks: int,
    shared: Mapping[str, Any] | None = None,
) -> Checkpoint:
    """The checkpoint with every rank's part.

    Args:
        checkpoint: Of rank 0, with the mean of the weights.
        parts: By rank; only that of the rank that writes when others have failed.
        num_ranks: Number of ranks in the training.
        shared: What a strategy keeps that is the same on all ranks.
    """
    content = {"version": VERSION, "num_ranks": num_ranks, "ranks": list(parts)}
    if shared:
        content["shared"] = move_data_to_device(dict(shared), torch.device("cpu"))
    return {**checkpoint, KEY: content}


def without_common(
    checkpoint: Mapping[str, Any], names: Collection[str], own: Collection[str]
) -> Checkpoint:
    """What a rank has to itself where all ranks have the same weights.

    Args:
        checkpoint: As Lightning and the callbacks made it for this rank.
        names: Of all weights and buffers of the module.
        own: Of those that every rank has to itself.
    """

    def rest(value: Any) -> Any:
        is_module = isinstance(value, Mapping) and bool(value) and value.keys() <= set(names)
        return {key: value[key] for key in own if key in value} if is_module else value

    return {key: rest(value) for key, value in checkpoint.items() if key != "optimizer_states"}


def copied(state: Mapping[str, Any]) -> dict[str, Any]:
    """The same with tensors of its own.

    Args:
        state: A module's state dictionary.
    """
    return {
        key: value.detach().clone() if isinstance(value, Tensor) else value
        for key, value in state.items()
    }


def with_own_weights(
    checkpoint: Checkpoint, mean: Mapping[str, Any] | None, own: Mapping[str, Any]
) -> Checkpoint:
    """The checkpoint with a rank's own weights wherever the mean of the models is.

    Args:
        checkpoint: As Lightning and the callbacks made it.
        mean: The very dictionary that they were given as the module's.
        own: This rank's; entries that somebody has taken out of the other stay out.
    """

    def back(value: Any) -> Any:
        if mean is None or value is not mean:
            return value
        return {key: own.get(key, entry) for key, entry in mean.items()}

    return {key: back(value) for key, value in checkpoint.items()}


def mean_over_ranks(state: Mapping[str, Any], exchange: Collectives, step: int) -> dict[str, Any]:
    """A state dictionary with the means of its floating-point tensors.

    Args:
        state: This rank's.
        exchange: Between the ranks.
        step: Optimizer steps so far.
    """
    mean = copied(state)
    floating = [x for x in mean.values() if isinstance(x, Tensor) and x.is_floating_point()]
    flat = FlatBuffers(floating, exact=True)
    flat.pack()
    exchange.mean(flat, Purpose.CONSENSUS, step)
    flat.unpack()
    return mean


def is_complete(checkpoint: Mapping[str, Any], num_ranks: int) -> bool:
    """Whether each of so many ranks finds its part.

    Args:
        checkpoint: As read from the file.
        num_ranks: Number of ranks now.
    """
    return KEY in checkpoint and len(checkpoint[KEY]["ranks"]) == num_ranks


def for_rank(checkpoint: Checkpoint, rank: int, num_ranks: int) -> Checkpoint:
    """What a rank goes on from.

    Args:
        checkpoint: As read from the file.
        rank: This rank.
        num_ranks: Number of ranks now.
    """
    if KEY not in checkpoint:
        return checkpoint
    parts = checkpoint[KEY]["ranks"]
    if is_complete(checkpoint, num_ranks):
        return _merged(checkpoint, parts[rank])
    states = [part["optimizer_states"] for part in parts if "optimizer_states" in part]
    why = _why_not(len(parts), checkpoint[KEY]["num_ranks"], num_ranks)
    state = {**_shared(parts[0][KEY]), **_same_on_all(checkpoint)}
    if not states:  # all ranks had the same weights and optimizer states
        rank_zero_warn(f"{why}: every rank starts without momentum of its own.")
        return {**checkpoint, KEY: state}
    rank_zero_warn(
        f"{why}: every rank starts from the mean of their weights and of their optimizer states."
    )
    return {**checkpoint, "optimizer_states": mean_of_states(states), KEY: state}


def _merged(checkpoint: Checkpoint, part: Checkpoint) -> Checkpoint:
    """What all have in common, and in its place what a rank has to itself."""
    merged = {**checkpoint, **part, KEY: {**part[KEY], **_same_on_all(checkpoint)}}
    for key, value in part.items():
        common = checkpoint.get(key)
        if key != KEY and isinstance(value, Mapping) and isinstance(common, Mapping):
            merged[key] = {**common, **value}
    return merged


def _same_on_all(checkpoint: Checkpoint) -> Checkpoint:
    return {"shared": checkpoint[KEY]["shared"]} if "shared" in checkpoint[KEY] else {}


def _why_not(num_parts: int, num_then: int, num_now: int) -> str:
    if num_parts < num_then:
        return f"The checkpoint was written after a failure, when {num_parts} of {num_then} ranks could be reached"
    return f"The checkpoint is of {num_then} ranks, this is a training on {num_now}"


def _shared(state: Mapping[str, Any]) -> Checkpoint:
    """The strategy's state without what belongs to a rank alone."""
    return {key: value for key, value in state.items() if key not in ("random", "own")}


def mean_of_states(states: Sequence[Any]) -> Any:
    """Nested containers with the mean of their floating-point tensors; the rest is that of the first.

    Args:
        states: Of the same structure.

    Example:
        >>> mean_of_states([{"m": torch.tensor([1.0]), "n": 3}, {"m": torch.tensor([2.0]), "n": 3}])
        {'m': tensor([1.5000]), 'n': 3}
    """
    first = states[0]
    if isinstance(first, Tensor):
        wide = [state.double() for state in states] if first.is_floating_point() else []
        return torch.stack(wide).mean(dim=0).to(first.dtype) if wide else first
    if isinstance(first, Mapping):
        return {
            key: mean_of_states([state[key] for state in states if key in state]) for key in first
        }
    if isinstance(first, (list, tuple)):
        return type(first)(map(mean_of_states, zip(*states, strict=True)))
    return first


def random_states() -> Checkpoint:
    """The global generators, as tensors, numbers and lists."""
    numpy_state: Any = np.random.get_state()  # noqa: NPY002  # the generator that others draw from
    name, keys, *rest = numpy_state
    states: Checkpoint = {
        "torch": torch.get_rng_state(),
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), *rest],
        "python": random.getstate(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_random_states(states: Mapping[str, Any]) -> None:
    """Put the global generators where they were.

    Args:
        states: From :func:`random_states`.
    """
    torch.set_rng_state(states["torch"])
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002  # as above
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
