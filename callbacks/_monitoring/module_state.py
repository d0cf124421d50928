"""Keeps a module as it is while its forward pass is used for a measurement."""

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
    """Put back what forward passes change: buffers, attributes, states of metrics; whatever happens.

    Attributes that were replaced get their old value again. Tensors, lists and dictionaries that were changed in place
    get their old content. Parameters are left alone.

    Args:
        module: All of its parts are kept.
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
                _put_back(value, content)


def _contents(state: dict[str, Any]) -> Iterator[Undo]:
    """Everything that can be changed in place, with a copy of what is in it."""
    for value in state.values():
        if isinstance(value, list):
            yield value, list(value)
            yield from ((each, each.clone()) for each in value if _is_loose(each))
        elif isinstance(value, dict):
            yield value, dict(value)
            yield from ((each, each.clone()) for each in value.values() if _is_loose(each))
        elif _is_loose(value):
            yield value, value.clone()


def _is_loose(value: object) -> bool:
    return isinstance(value, Tensor) and not isinstance(value, nn.Parameter)


def _put_back(value: Any, content: Any) -> None:
    if isinstance(value, Tensor):
        # By content: batch normalisation changes its statistics without raising their version.
        if not torch.equal(value, content):
            value.copy_(content)
    elif isinstance(value, list):
        value[:] = content
    elif list(map(id, value.values())) != list(map(id, content.values())):
        value.clear()
        value.update(content)


@contextmanager
def random_states_kept() -> Iterator[None]:
    """Put all random states back; Lightning's `isolate_rng` alone does not when something fails."""
    failure: BaseException | None = None
    with isolate_rng():
        try:
            yield
        except BaseException as error:
            failure = error
    if failure is not None:
        raise failure
