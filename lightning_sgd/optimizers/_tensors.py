"""Sort tensors by type, make their states and refuse unsupported ones, before the mathematics begins."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from operator import eq
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

Lists: TypeAlias = tuple[list[Tensor], ...]


class TensorType(NamedTuple):
    """Device, type and alignment that the tensors of one list have in common.

    Attributes:
        device: Where they are.
        dtype: Type of parameters and states.
        aligned: Whether parameter, gradient and states share their strides. Fused kernels walk through memory and
            silently pair the wrong elements otherwise.
    """

    device: torch.device
    dtype: torch.dtype
    aligned: bool


def refuse_complex(params: Iterable[Tensor], name: str) -> None:
    """Refuse parameters that the update rule is not defined for.

    Args:
        params: The parameters of a group.
        name: Name of the optimizer, for the message.

    Raises:
        ValueError: If a parameter is complex.
    """
    for param in params:
        if param.is_complex():
            raise ValueError(
                f"Expected `params` of {name} to be real, got {param.dtype}. "
                "Optimize `torch.view_as_real(parameter)` instead."
            )


def refuse_sharded(params: Iterable[Tensor], name: str) -> None:
    """Refuse parameters of which this process holds a part only, where the update rule needs norms of the whole.

    Args:
        params: The parameters of a group.
        name: Name of the optimizer, for the message.

    Raises:
        ValueError: If a parameter is a ``DTensor``.
    """
    for param in params:
        # Asked by an attribute, because importing DTensor is slow and not possible in every build of torch.
        if hasattr(param, "device_mesh"):
            raise ValueError(
                f"Expected `params` of {name} to be whole tensors, got a {type(param).__name__}. "
                "Use a strategy that replicates parameters, such as `ddp`."
            )


def refuse_sparse(params: Iterable[Tensor], name: str) -> None:
    """Refuse gradients that the update rule would have to fill up.

    Args:
        params: Parameters, with or without gradients.
        name: Name of what refuses, for the message.

    Raises:
        ValueError: If a gradient is sparse.
    """
    if any(
        (grad := param.grad) is not None and grad.layout is not torch.strided for param in params
    ):
        raise ValueError(
            f"Expected gradients to be dense for {name}, got a sparse one. "
            "Use `sparse=False` in the embedding, or torch.optim.SparseAdam for it."
        )


def tensors_by_type(
    optimizer: Optimizer, group: dict[str, Any], *state_names: str
) -> dict[TensorType, Lists]:
    """Collect parameters with a gradient, their gradients and states, in lists that one kernel can take.

    States that do not exist yet are made, filled with zeros.

    Args:
        optimizer: Owner of the states.
        group: One of its parameter groups.
        *state_names: Keys of per-parameter state tensors of the parameter's shape and dtype.

    Returns:
        For each type the lists (params, grads, states of the first name, …).
    """
    params = [param for param in group["params"] if param.grad is not None]
    grads = [param.grad for param in params]
    states = [optimizer.state[param] for param in params]
    for name in state_names:
        for param, state in zip(params, states, strict=True):
            if name not in state:
                # The parameter's strides, too: fused kernels need them equal.
                state[name] = torch.zeros_like(param, memory_format=torch.preserve_format)
            elif state[name].dtype != param.dtype or state[name].device != param.device:
                # ``module.to(…)`` converts parameters in place and knows nothing of the optimizer.
                state[name] = state[name].to(param.device, param.dtype)
    return _by_type((params, grads, *([state[name] for state in states] for name in state_names)))


def _by_type(lists: Lists) -> dict[TensorType, Lists]:
    """Split parallel lists by type; a single type, the usual case, needs no sorting tensor by tensor."""
    params = lists[0]
    # Compared one by one: thousands of tuples at a time would wake the garbage collector.
    aligned = all(
        all(map(eq, map(Tensor.stride, params), map(Tensor.stride, tensors)))
        for tensors in lists[1:]
    )
    # Empty lists come here, too, and must give no type at all.
    if aligned and len({(p.device, p.dtype) for p in params}) == 1:
        return {TensorType(params[0].device, params[0].dtype, aligned=True): lists}
    rows: dict[TensorType, list[tuple[Tensor, ...]]] = {}
    for row in zip(*lists, strict=True):
        aligned = len({tensor.stride() for tensor in row}) == 1
        rows.setdefault(TensorType(row[0].device, row[0].dtype, aligned), []).append(row)
    return {kind: tuple(map(list, zip(*found, strict=True))) for kind, found in rows.items()}


def scalar_states(optimizer: Optimizer, params: list[Tensor], name: str) -> list[Tensor]:
    """Return one number per parameter, in single precision at least; zero where it does not exist yet.

    Args:
        optimizer: Owner of the states.
        params: Some of its parameters.
        name: Key of the state.
    """
    states = [optimizer.state[param] for param in params]
    for param, state in zip(params, states, strict=True):
        if name not in state:
            state[name] = torch.zeros((), dtype=scalar_dtype(param), device=param.device)
    return [state[name] for state in states]


def scalar_buffer(optimizer: Optimizer, params: list[Tensor], name: str) -> Tensor:
    """Return :func:`scalar_states` as one tensor, of which the states are views: to change it is to change them.

    States that are not yet, or no longer, neighbours in memory are moved.

    Args:
        optimizer: Owner of the states.
        params: Some of its parameters, of one device and dtype.
        name: Key of the state.
    """
    values = scalar_states(optimizer, params, name)
    # torch knows of a view which tensor it is a part of, under a private name; a view that was replaced has another
    # base.
    buffer = values[0]._base
    dtype, device = scalar_dtype(params[0]), params[0].device
    if (
        buffer is not None
        and buffer.shape == (len(values),)
        and (buffer.dtype, buffer.device) == (dtype, device)
        and all(v._base is buffer and v.storage_offset() == i for i, v in enumerate(values))
    ):
        return buffer
    # Converted where ``module.to(…)`` has converted the parameters.
    buffer = torch.stack([value.to(device, dtype) for value in values])
    for param, value in zip(params, buffer.unbind(), strict=True):
        optimizer.state[param][name] = value
    return buffer


def scalar_dtype(param: Tensor) -> torch.dtype:
    """Return the type of numbers that belong to a parameter: its own, but no less than single precision.

    Args:
        param: The parameter.

    Example:
        >>> scalar_dtype(torch.zeros(1, dtype=torch.bfloat16))
        torch.float32
    """
    return torch.promote_types(param.dtype, torch.float32)


def restore_scalar_states(optimizer: Optimizer, state_dict: Mapping[str, Any], *names: str) -> None:
    """Undo what ``Optimizer.load_state_dict`` does to numbers of half-precision parameters: it rounds them.

    Args:
        optimizer: It has just loaded ``state_dict``.
        state_dict: What it has loaded.
        *names: Keys of the states of :func:`scalar_states`.
    """
    saved_ids = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
    params = chain.from_iterable(group["params"] for group in optimizer.param_groups)
    for saved_id, param in zip(saved_ids, params, strict=True):
        saved = state_dict["state"].get(saved_id, {})
        for name in set(names) & set(saved):
            optimizer.state[param][name] = saved[name].to(param.device, scalar_dtype(param)).clone()


def portions(lists: Lists, limit: int = 2**18) -> Iterator[tuple[list[int], Lists]]:
    """Cut parallel lists into portions of so many elements, for steps that need temporary copies.

    On a CPU the copies then stay in the cache and need no fresh memory; elsewhere everything is one portion.

    Args:
        lists: Lists of equal lengths, tensors of equal shapes at equal places.
        limit: Number of elements; larger tensors are cut if they are contiguous, and come alone if not.

    Returns:
        Portions, each with the places in the lists that its tensors are, or are pieces of.

    Example:
        >>> params = [torch.zeros(size) for size in (3, 3, 9, 1)]
        >>> [indices for indices, _ in portions((params, params), limit=6)]
        [[0, 1], [2], [2], [3]]
    """
    indices: list[int] = []
    # Elsewhere every further portion would cost launches of kernels and save nothing.
    if lists[0][0].device.type != "cpu":
        yield list(range(len(lists[0]))), lists
        return
    total = 0
    for index, row in enumerate(zip(*lists, strict=True)):
        size = row[0].numel()
        if indices and total + size > limit:
            yield indices, tuple([tensors[i] for i in indices] for tensors in lists)
            indices, total = [], 0
        # Only a flat view can be cut at any place without a copy.
        if size > limit and all(tensor.is_contiguous() for tensor in row):
            pieces = zip(*(tensor.view(-1).split(limit) for tensor in row), strict=True)
            yield from (([index], tuple([piece] for piece in piece_row)) for piece_row in pieces)
        else:
            indices.append(index)
            total += size
    if indices:
        yield indices, tuple([tensors[i] for i in indices] for tensors in lists)
