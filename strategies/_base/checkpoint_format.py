"""The format of checkpoints of a training in which every rank has its own model.

The file is an ordinary checkpoint: ``state_dict`` is the mean of the models, the rest is that of rank 0. One more key,
``lightning_sgd``, holds for every rank what it would have written alone. A training on as many ranks resumes exactly
from these; everything else reads the mean.
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
    """Return what is stored for one rank, on the CPU.

    Args:
        checkpoint: As Lightning would write it for this rank, with this rank's weights.
        state: State of the strategy.
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
    """Add the parts of the ranks to the checkpoint of rank 0.

    Args:
        checkpoint: Checkpoint of rank 0, with the mean of the weights.
        parts: Parts in order of rank; only that of the writing rank if others have failed.
        num_ranks: Number of ranks in the training.
        shared: State of the strategy that is the same on all ranks.
    """
    content = {"version": VERSION, "num_ranks": num_ranks, "ranks": list(parts)}
    if shared:
        content["shared"] = move_data_to_device(dict(shared), torch.device("cpu"))
    return {**checkpoint, KEY: content}


def without_common(
    checkpoint: Mapping[str, Any], names: Collection[str], own: Collection[str]
) -> Checkpoint:
    """Remove what is the same on all ranks from a rank's checkpoint, if all ranks have the same weights.

    Args:
        checkpoint: As Lightning and the callbacks made it for this rank.
        names: Names of all weights and buffers of the module.
        own: Names of those that differ from rank to rank.
    """

    def rest(value: Any) -> Any:
        is_module = isinstance(value, Mapping) and bool(value) and value.keys() <= set(names)
        return {key: value[key] for key in own if key in value} if is_module else value

    return {key: rest(value) for key, value in checkpoint.items() if key != "optimizer_states"}


def copied(state: Mapping[str, Any]) -> dict[str, Any]:
    """Clone the tensors of a module's state dictionary."""
    return {
        key: value.detach().clone() if isinstance(value, Tensor) else value
        for key, value in state.items()
    }


def with_own_weights(
    checkpoint: Checkpoint, mean: Mapping[str, Any] | None, own: Mapping[str, Any]
) -> Checkpoint:
    """Replace the mean of the models by a rank's own weights.

    Args:
        checkpoint: As Lightning and the callbacks made it.
        mean: The dictionary that they got as the module's; it is found by identity.
        own: State dictionary of this rank; entries that a callback has removed from ``mean`` are left out.
    """

    def restore(value: Any) -> Any:
        if mean is None or value is not mean:
            return value
        return {key: own.get(key, entry) for key, entry in mean.items()}

    return {key: restore(value) for key, value in checkpoint.items()}


def mean_over_ranks(state: Mapping[str, Any], exchange: Collectives, step: int) -> dict[str, Any]:
    """Average the floating-point tensors of a state dictionary over the ranks, which call this together."""
    mean = copied(state)
    floating = [x for x in mean.values() if isinstance(x, Tensor) and x.is_floating_point()]
    flat = FlatBuffers(floating, exact=True)
    flat.pack()
    exchange.all_reduce_mean(flat, Purpose.CONSENSUS, step)
    flat.unpack()
    return mean


def is_complete(checkpoint: Mapping[str, Any], num_ranks: int) -> bool:
    """Tell whether the checkpoint has a part for each of the ranks of this training."""
    return KEY in checkpoint and len(checkpoint[KEY]["ranks"]) == num_ranks


def for_rank(checkpoint: Checkpoint, rank: int, num_ranks: int) -> Checkpoint:
    """Return the checkpoint from which a rank of this training resumes."""
    if KEY not in checkpoint:
        return checkpoint
    parts = checkpoint[KEY]["ranks"]
    if is_complete(checkpoint, num_ranks):
        return _merged(checkpoint, parts[rank])
    states = [part["optimizer_states"] for part in parts if "optimizer_states" in part]
    why = _describe_missing_parts(len(parts), checkpoint[KEY]["num_ranks"], num_ranks)
    state = {**_shared(parts[0][KEY]), **_same_on_all(checkpoint)}
    if not states:  # all ranks had the same weights and optimizer states
        rank_zero_warn(f"{why}: every rank starts without momentum of its own.")
        return {**checkpoint, KEY: state}
    rank_zero_warn(
        f"{why}: every rank starts from the mean of their weights and of their optimizer states."
    )
    return {**checkpoint, "optimizer_states": mean_of_states(states), KEY: state}


def _merged(checkpoint: Checkpoint, part: Checkpoint) -> Checkpoint:
    """Replace entries of the common checkpoint by those of a rank."""
    merged = {**checkpoint, **part, KEY: {**part[KEY], **_same_on_all(checkpoint)}}
    for key, value in part.items():
        common = checkpoint.get(key)
        if key != KEY and isinstance(value, Mapping) and isinstance(common, Mapping):
            merged[key] = {**common, **value}
    return merged


def _same_on_all(checkpoint: Checkpoint) -> Checkpoint:
    return {"shared": checkpoint[KEY]["shared"]} if "shared" in checkpoint[KEY] else {}


def _describe_missing_parts(num_parts: int, num_then: int, num_now: int) -> str:
    if num_parts < num_then:
        return f"The checkpoint was written after a failure, when {num_parts} of {num_then} ranks could be reached"
    return f"The checkpoint is of {num_then} ranks, this is a training on {num_now}"


def _shared(state: Mapping[str, Any]) -> Checkpoint:
    """Remove from the state of the strategy what belongs to one rank."""
    return {key: value for key, value in state.items() if key not in ("random", "own")}


def mean_of_states(states: Sequence[Any]) -> Any:
    """Average the floating-point tensors of nested containers of the same structure; the rest is that of the first.

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
    """Return the states of the global random generators as tensors, numbers and lists."""
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
    """Restore :func:`random_states`."""
    torch.set_rng_state(states["torch"])
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002  # as above
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
