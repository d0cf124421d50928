"""Work with lists of tensors below the update rules: probes of torch's private kernels, small tensors, norms.

A private kernel is trusted after one step of which the result is known. On a CPU a call takes longer than the
arithmetic of a small tensor, so small tensors of one shape are copied into one piece of memory.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain

import torch
from torch import Tensor

NUM_VALUES = 67
"""Enough for vector instructions and a rest: torch 2.13 on a CPU leaves garbage from 16 elements of 16 bits on."""


def powers_of_two(device_type: str, dtype: torch.dtype) -> Tensor:
    """Return different values by which a linear step can be scaled without rounding.

    Args:
        device_type: For example ``"cpu"`` or ``"cuda"``.
        dtype: Floating-point type.

    Example:
        >>> powers_of_two("cpu", torch.float32)[:8]
        tensor([ 1.,  2.,  4.,  8., 16., 32., 64.,  1.])
    """
    return (2.0 ** (torch.arange(NUM_VALUES, device=device_type) % 7)).to(dtype)


def signs(device_type: str, dtype: torch.dtype) -> Tensor:
    """Return values by which a step that does not depend on scale can be mirrored.

    Args:
        device_type: For example ``"cpu"`` or ``"cuda"``.
        dtype: Floating-point type.

    Example:
        >>> signs("cpu", torch.float32)[:4]
        tensor([ 1., -1., -1.,  1.])
    """
    index = torch.arange(NUM_VALUES, device=device_type)
    return (1.0 - 2.0 * ((index % 3) != 0)).to(dtype)


def runs(step: Callable[[], None]) -> bool:
    """Return whether a call into private API of torch can be made at all; the caller checks what it computes.

    Args:
        step: Makes the call. That a kernel is gone, lacks a device or a type, or takes other arguments in this version
            of torch shows as one of four kinds of errors; any other is a mistake of ours and is raised.

    Example:
        >>> def renamed():
        ...     torch._no_such_kernel_()
        >>> runs(renamed)
        False
    """
    try:
        step()
    # Gone; not for this type; not on this device; called in another way.
    except (AttributeError, NotImplementedError, RuntimeError, TypeError):
        return False
    return True


SMALL = 2**12
"""Largest number of elements at which copying pays; from 6000 on, single calls were as fast."""
_PORTION = 2**18
"""Number of elements that are copied at a time; they stay in the second-level cache."""


def small_by_shape(tensors: list[Tensor]) -> tuple[list[list[int]], list[int]]:
    """Sort tensors into those that are worth copying together and those that are not.

    The answer depends on shapes and strides alone, so a resumed run rounds as the first one did.

    Args:
        tensors: Tensors of one device and dtype.

    Returns:
        Places of small contiguous tensors, in portions of equal shape, and the places of all others.

    Example:
        >>> small_by_shape([torch.zeros(shape) for shape in (3, (2, 5000), 3, 4)])
        ([[0, 2]], [1, 3])
    """
    # Only contiguous tensors of one shape: the copy walks through memory, and other strides would pair wrong elements.
    by_shape: dict[torch.Size, list[int]] = {}
    others = []
    for place, tensor in enumerate(tensors):
        if 0 < tensor.numel() <= SMALL and tensor.is_contiguous():
            by_shape.setdefault(tensor.shape, []).append(place)
        else:
            others.append(place)
    portions = []
    for shape, places in by_shape.items():
        # Copying a single tensor costs a pass over it and saves no call.
        if len(places) == 1:
            others += places
        else:
            num = _PORTION // shape.numel()
            portions += [places[i : i + num] for i in range(0, len(places), num)]
    return portions, sorted(others)


def stack_scaled(tensors: list[Tensor], factors: Tensor) -> list[Tensor]:
    """Copy tensors of one shape, each multiplied by a factor.

    Args:
        tensors: Tensors of one shape, device and dtype.
        factors: One for each, of the same dtype.

    Example:
        >>> stack_scaled([torch.ones(2), torch.ones(2)], torch.tensor([3.0, 4.0]))
        [tensor([3., 3.]), tensor([4., 4.])]
    """
    copies = torch.stack(tensors)
    copies.view(len(tensors), -1).mul_(factors[:, None])
    return list(copies.unbind())


_BLOCK = 2**16
"""On a CPU single precision sums up so many squares to 1e-6; 25 million in one go are off by 3e-3."""


def squared_norms(tensors: list[Tensor], dtype: torch.dtype) -> Tensor:
    """Compute the squared Euclidean norm of each tensor, of shape (number of tensors,).

    Args:
        tensors: Tensors of one device.
        dtype: Type in which to sum up and to answer; half precision would overflow at a norm of 256.

    Example:
        >>> squared_norms([torch.tensor([3.0, 4.0]), torch.ones(2, 2)], torch.float32)
        tensor([25.,  4.])
    """
    # A GPU adds up in a tree, so its rounding error does not grow with the number of elements as on a CPU.
    if tensors[0].device.type != "cpu":
        return torch.stack(torch._foreach_norm(tensors, 2, dtype)).square()
    portions, others = small_by_shape(tensors)
    places = [*chain.from_iterable(portions), *others]
    norms = [_norms_of_rows([tensors[i] for i in portion], dtype) for portion in portions]
    if others:
        norms.append(torch.stack([_norm(tensors[i], dtype) for i in others]))
    squares = (torch.cat(norms) if len(norms) > 1 else norms[0]).square()
    return (
        # The norms were found shape by shape; the caller's order comes back without a copy where nothing was moved.
        squares if places == list(range(len(places))) else squares[torch.tensor(places).argsort()]
    )


def _norms_of_rows(tensors: list[Tensor], dtype: torch.dtype) -> Tensor:
    rows = torch.stack(tensors).view(len(tensors), -1)
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1, dtype=dtype)
    return norms


def _norm(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    # Up to four blocks the error of one sum is still near 1e-6.
    if tensor.numel() > 4 * _BLOCK:
        return _norm_by_blocks(tensor, dtype)
    norm: Tensor = torch.linalg.vector_norm(tensor, dtype=dtype)
    return norm


def _norm_by_blocks(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    flat = tensor.flatten()
    whole = flat.numel() - flat.numel() % _BLOCK
    blocks = torch.linalg.vector_norm(flat[:whole].view(-1, _BLOCK), dim=1, dtype=dtype)
    rest = torch.linalg.vector_norm(flat[whole:], dtype=dtype)
    norm: Tensor = torch.linalg.vector_norm(torch.cat([blocks, rest[None]]))
    return norm
