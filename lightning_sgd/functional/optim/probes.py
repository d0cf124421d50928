"""What private kernels of torch are tried with before they are trusted."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

NUM_VALUES = 67
"""Enough for vector instructions and a rest: torch 2.13 on a CPU leaves garbage from 16 elements of 16 bits on."""


def powers_of_two(device_type: str, dtype: torch.dtype) -> Tensor:
    """Different values by which a linear step can be scaled without rounding.

    Args:
        device_type: For example ``"cpu"`` or ``"cuda"``.
        dtype: Floating-point type.

    Example:
        >>> powers_of_two("cpu", torch.float32)[:8]
        tensor([ 1.,  2.,  4.,  8., 16., 32., 64.,  1.])
    """
    return (2.0 ** (torch.arange(NUM_VALUES, device=device_type) % 7)).to(dtype)


def signs(device_type: str, dtype: torch.dtype) -> Tensor:
    """Values by which a step that does not depend on scale can be mirrored.

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
    """Whether a call into private API of torch can be made at all; what it computes is for the caller to check.

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
