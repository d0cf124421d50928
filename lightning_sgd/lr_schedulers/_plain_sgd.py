"""Theorems about the step size of SGD are about SGD without momentum or preconditioning."""

from __future__ import annotations

from collections.abc import Iterator

from torch.optim import SGD, Optimizer


def differences_from_plain_sgd(optimizer: Optimizer) -> Iterator[str]:
    """Yield a sentence if the step of an optimizer is not step size times gradient."""
    if not isinstance(optimizer, SGD):
        yield (
            f"The theorems are about plain SGD, and {type(optimizer).__name__} makes other steps; "
            "use torch.optim.SGD without momentum."
        )
    elif any(group["momentum"] for group in optimizer.param_groups):
        yield "The theorems are about SGD without momentum; set `momentum` to 0."
