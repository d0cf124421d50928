"""Matrix products in full precision, whatever precision training uses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def full_precision() -> Iterator[None]:
    """Multiply float32 matrices in float32, without autocast, TensorFloat-32 or bfloat16, and restore these settings.

    Example:
        >>> x = torch.eye(2)
        >>> with torch.autocast("cpu"), full_precision():
        ...     (x @ x).dtype
        torch.float32
    """
    accelerator = torch.accelerator.current_accelerator()
    with ExitStack() as stack:
        for device_type in {"cpu", accelerator.type if accelerator else "cpu"}:
            stack.enter_context(torch.autocast(device_type, enabled=False))
        stack.enter_context(_ieee_matmul())
        yield


@contextmanager
def _ieee_matmul() -> Iterator[None]:
    mkldnn = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # exists at run time only
    backends = (torch.backends.cuda.matmul, mkldnn)
    before = [backend.fp32_precision for backend in backends]
    if {"none", "ieee"}.issuperset(before):  # nothing to change, nothing to restore
        yield
        return
    # torch refuses to multiply when its older and its newer settings contradict each other: change both, or
    # only the newer where the older is already refused.
    older = _older_precision()
    try:
        if older is not None:
            torch.set_float32_matmul_precision("highest")
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        if older is not None:
            torch.set_float32_matmul_precision(older)
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


def _older_precision() -> str | None:
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return None
