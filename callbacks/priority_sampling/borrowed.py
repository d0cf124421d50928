"""Replace the training step and the data loader of the user during a training, and take batches apart."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from lightning_sgd.callbacks._monitoring.extra_batches import side_effect_free


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
    with side_effect_free(module, train_mode=False), torch.no_grad():
        yield


def take_rows(batch: Any, rows: Tensor, num_rows: int) -> Any:
    """Select rows of every tensor and list that has ``num_rows`` of them, in any structure.

    Example:
        >>> take_rows({"x": torch.arange(3), "name": ["a", "b", "c"], "t": 5}, torch.tensor([2, 0]), 3)
        {'x': tensor([2, 0]), 'name': ['c', 'a'], 't': 5}
    """

    def of_tensor(tensor: Tensor) -> Tensor:
        return tensor[rows.to(tensor.device)] if tensor.ndim and len(tensor) == num_rows else tensor

    def of_list(values: Sequence[Any]) -> list[Any]:
        return [values[row] for row in rows.tolist()] if len(values) == num_rows else list(values)

    def check(owner: object, tensor: Tensor) -> None:
        # In a batch of graphs, for example, the rows of one tensor are nodes and those of another are edges.
        if tensor.ndim and len(tensor) != num_rows:
            raise ValueError(
                f"Expected every tensor of {type(owner).__name__} to have one row for each of the {num_rows} samples "
                f"for `selection`, got shape {tuple(tensor.shape)}. Use a tuple or a dictionary, or leave `selection` "
                "out."
            )

    return _Rebuilder(of_tensor, of_list, check).part(batch)


def fresh(batch: Any) -> Any:
    """Copy a batch, so that a training step may change it; other content than tensors and containers is shared."""
    return _Rebuilder(torch.clone, list).part(batch)


@dataclasses.dataclass
class _Rebuilder:
    """Builds a batch of the same structure: pytrees, mappings, dataclasses and objects that move by ``.to``."""

    of_tensor: Callable[[Tensor], Tensor]
    of_list: Callable[[Sequence[Any]], list[Any]]
    check: Callable[[object, Tensor], None] | None = None

    def part(self, value: Any) -> Any:
        leaves, spec = tree_flatten(value, is_leaf=_is_plain_list)
        if len(leaves) == 1 and leaves[0] is value:
            return self._leaf(value)
        return tree_unflatten([self.part(each) for each in leaves], spec)

    def _leaf(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self.of_tensor(value)
        if _is_plain_list(value):
            return self.of_list(value)
        if isinstance(value, Mapping):
            return type(value)({key: self.part(item) for key, item in value.items()})  # type: ignore[call-arg]  # as dict
        if isinstance(value, (list, tuple)):  # of a class that torch does not know
            return type(value)([self.part(each) for each in value])
        is_data = dataclasses.is_dataclass(value) and not isinstance(value, type)
        return self._attributes(value) if is_data or hasattr(value, "to") else value

    def _attributes(self, value: Any) -> Any:
        fields = dataclasses.fields(value) if dataclasses.is_dataclass(value) else ()
        names = [field.name for field in fields] or list(getattr(value, "__dict__", {}))
        copied = copy.copy(value)
        for name in names:
            content = getattr(value, name)
            if isinstance(content, Tensor) and self.check is not None and not fields:
                self.check(value, content)
            object.__setattr__(copied, name, self.part(content))  # also of frozen dataclasses
        return copied


def _is_plain_list(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, _PLAIN) for each in value)
