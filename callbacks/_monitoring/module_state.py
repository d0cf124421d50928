"""Restore a module and the random states after forward passes that only measure."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

Undo: TypeAlias = tuple[Any, Any]


@contextmanager
def module_state_kept(module: nn.Module) -> Iterator[None]:
    """Restore buffers, attributes and states of metrics of all sub-modules afterwards, also after an exception.

    Replaced attributes get their old value again. Tensors, lists and dictionaries that were changed in place get their
    old content. Parameters are not touched.
    """
    parts = [(part, dict(vars(part))) for part in module.modules()]
    contents = [undo for _, state in parts for undo in _contents(state)]
    try:
        yield
    finally:
        for part, state in parts:
            vars(part).clear()
            vars(part).update(state)
        with torch.no_grad():
            for value, content in contents:
                _restore(value, content)


def _contents(state: dict[str, Any]) -> Iterator[Undo]:
    """Yield everything that can be changed in place, with a copy of its content."""
    for value in state.values():
        if isinstance(value, list):
            yield value, list(value)
            yield from ((each, each.clone()) for each in value if _is_plain_tensor(each))
        elif isinstance(value, dict):
            yield value, dict(value)
            yield from ((each, each.clone()) for each in value.values() if _is_plain_tensor(each))
        elif _is_plain_tensor(value):
            yield value, value.clone()


def _is_plain_tensor(value: object) -> bool:
    return isinstance(value, Tensor) and not isinstance(value, nn.Parameter)


def _restore(value: Any, content: Any) -> None:
    if isinstance(value, Tensor):
        # By content: batch normalisation changes its statistics without incrementing their version counter.
        if not torch.equal(value, content):
            value.copy_(content)
    elif isinstance(value, list):
        value[:] = content
    elif list(map(id, value.values())) != list(map(id, content.values())):
        value.clear()
        value.update(content)


@contextmanager
def random_states_kept() -> Iterator[None]:
    """Restore all random states afterwards, also after an exception.

    ``isolate_rng`` of Lightning has no ``finally``, so the exception is raised again outside of it.
    """
    failure: BaseException | None = None
    with isolate_rng():
        try:
            yield
        except BaseException as error:
            failure = error
    if failure is not None:
        raise failure
