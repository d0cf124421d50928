"""Short hashes, by which ranks compare weights and layouts without exchanging them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor


def fingerprint(tensors: Iterable[Tensor]) -> int:
    """Hash all bits of some tensors, on any devices, to 63 bits.

    Example:
        >>> fingerprint([torch.zeros(2)]) == fingerprint([torch.zeros(2)])
        True
        >>> fingerprint([torch.zeros(2)]) == fingerprint([-torch.zeros(2)])
        False
    """
    digest = hashlib.sha256()
    for tensor in tensors:
        # NumPy has no bfloat16, so bytes are compared; −0 and 0, or two kinds of NaN, are then different.
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return _to_int(digest.digest())


def layout(named: Iterable[tuple[str, Tensor]]) -> int:
    """Hash names, shapes, types and order of some tensors to 63 bits.

    Example:
        >>> layout([("weight", torch.ones(2))]) == layout([("weight", torch.zeros(2))])
        True
        >>> layout([("weight", torch.ones(2))]) == layout([("weight", torch.ones(2, 1))])
        False
    """
    text = ";".join(f"{name} {tuple(x.shape)} {x.dtype}" for name, x in named)
    return short_hash(text.encode())


def short_hash(content: bytes) -> int:
    """Hash bytes to 63 bits of SHA-256."""
    # Not `hash`, which Python salts anew in every process.
    return _to_int(hashlib.sha256(content).digest())


def _to_int(digest: bytes) -> int:
    # 63 bits: the numbers are exchanged as int64.
    return int.from_bytes(digest[:8], "big") >> 1
