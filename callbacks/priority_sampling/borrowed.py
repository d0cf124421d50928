"""Replace the training step and the data loader of the user during a training, and take batches apart."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_sgd.callbacks._monitoring.extra_batches import measuring


class PatchedAttributes:
    """Attributes of objects that are replaced during a training, with their originals."""

    def __init__(self) -> None:
        self._originals: list[tuple[Any, str, Any]] = []

    def replace_attribute(self, owner: Any, name: str, value: object) -> None:
        """Replace an attribute of the object, not of its class."""
        self._originals.append((owner, name, vars(owner).get(name, _ABSENT)))
        vars(owner)[name] = value

    def wrap(self, owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
        """Call ``wrapper(original, *args, **kwargs)`` in place of a method."""
        original = getattr(owner, name)

        @wraps(original)
        def call(*args: Any, **kwargs: Any) -> Any:
            return wrapper(original, *args, **kwargs)

        self.replace_attribute(owner, name, call)

    def restore(self) -> None:
        """Restore the originals, the last one that was replaced first."""
        while self._originals:
            owner, name, value = self._originals.pop()
            if value is _ABSENT:
                vars(owner).pop(name, None)
            else:
                vars(owner)[name] = value


_ABSENT = object()
_PLAIN = (str, bytes, int, float)


def replace_train_dataloader(
    trainer: Trainer, patches: PatchedAttributes, replace: Callable[[object], object]
) -> None:
    """Replace the training data loader, whether Lightning gets it from an argument, the module or a data module."""
    # The only place that knows where Lightning keeps its source.
    source = trainer.fit_loop._data_source
    if source.is_module():
        patches.wrap(source.instance, source.name, lambda original: replace(original()))
    else:
        patches.replace_attribute(source, "instance", replace(source.instance))


@contextmanager
def side_effect_free_eval(module: LightningModule) -> Iterator[None]:
    """Evaluate without gradients, and restore what a training step changes: buffers, statistics; logs are dropped."""
    with measuring(module, train_mode=False), torch.no_grad():
        yield


def take_rows(batch: Any, rows: Tensor, num_rows: int) -> Any:
    """Select rows of every tensor and list that has ``num_rows`` of them, in tuples, dictionaries and dataclasses.

    Example:
        >>> take_rows({"x": torch.arange(3), "name": ["a", "b", "c"], "t": 5}, torch.tensor([2, 0]), 3)
        {'x': tensor([2, 0]), 'name': ['c', 'a'], 't': 5}
    """

    def part(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value[rows.to(value.device)] if value.ndim and len(value) == num_rows else value
        if isinstance(value, Mapping):
            return type(value)({key: part(item) for key, item in value.items()})  # type: ignore[call-arg]  # as dict
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*map(part, value))
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            fields = dataclasses.fields(value)
            return dataclasses.replace(
                value, **{f.name: part(getattr(value, f.name)) for f in fields}
            )
        if isinstance(value, (list, tuple)):
            return type(value)(_elements(value))
        return value

    def _elements(values: Sequence[Any]) -> list[Any]:
        has_rows = len(values) == num_rows and all(isinstance(v, _PLAIN) for v in values)
        return [values[row] for row in rows.tolist()] if has_rows else [part(v) for v in values]

    return part(batch)
