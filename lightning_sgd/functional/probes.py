"""What private kernels of torch are tried with before they are trusted."""

from __future__ import annotations

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
