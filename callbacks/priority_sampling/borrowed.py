"""Training steps and data loaders of the user, borrowed for the time of a training."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lightning_sgd.callbacks._monitoring.extra_batches import side_effect_free


class Loan:
    """Attributes that are replaced on an object, and given back.

    Functions keep their names and signatures, by which Lightning decides what to call them with.
    """

    def __init__(self) -> None:
        self._borrowed: list[tuple[Any, str, Any]] = []

    def replace_attribute(self, owner: Any, name: str, value: object) -> None:
        """Replace an attribute of one object, not of its class."""
        self._borrowed.append((owner, name, vars(owner).get(name, _ABSENT)))
        vars(owner)[name] = value

    def wrap(self, owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
        """Let ``wrapper(original, *args, **kwargs)`` answer for a method."""
        original = getattr(owner, name)

        @wraps(original)
        def call(*args: Any, **kwargs: Any) -> Any:
            return wrapper(original, *args, **kwargs)

        # Lightning looks one wrapper deep for the signature.
        call.__wrapped__ = getattr(original, "__wrapped__", original)
        self.replace_attribute(owner, name, call)

    def give_back(self) -> None:
        """Put everything back."""
        while self._borrowed:
            owner, name, value = self._borrowed.pop()
            if value is _ABSENT:
                vars(owner).pop(name, None)
            else:
                vars(owner)[name] = value


_ABSENT = object()
_PLAIN = (str, bytes, int, float)


def replace_train_dataloader(
    trainer: Trainer, loan: Loan, replace: Callable[[object], object]
) -> None:
    """Let Lightning get another training data loader, wherever it takes it from.

    The one place that knows where Lightning keeps its source.

    Args:
        trainer: About to fit.
        loan: To give it back by.
        replace: From the user's loader to the other one.
    """
    source = trainer.fit_loop._data_source
    if source.is_module():
        loan.wrap(source.instance, source.name, lambda original: replace(original()))
    else:
        loan.replace_attribute(source, "instance", replace(source.instance))


@contextmanager
def silent_evaluation(module: LightningModule) -> Iterator[None]:
    """Evaluation mode without gradients, in which a training step leaves no trace: no statistics, no log.

    Args:
        module: Whose training step is going to be called.
    """
    with side_effect_free(module, train_mode=False), torch.no_grad():
        yield


def same_batch(batch: object, other: object) -> bool:
    """Whether they hold the same tensors; wrappers such as DDP may have rebuilt the containers."""
    if batch is other:
        return True
    ours, theirs = tree_leaves(batch), tree_leaves(other)
    return len(ours) == len(theirs) and all(a is b for a, b in zip(ours, theirs, strict=True))


def take_rows(batch: Any, rows: Tensor, num_rows: int) -> Any:
    """A part of a batch: of every tensor and list with as many rows as samples, in tuples, dictionaries, dataclasses.

    Args:
        batch: Of any structure.
        rows: Numbers of the rows.
        num_rows: Rows of the whole.

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


def all_gathered(values: Tensor, num_ranks: int) -> Tensor:
    """The values of all ranks in order, on the CPU; as many from each.

    Args:
        values: Of this rank.
        num_ranks: How many there are.
    """
    if num_ranks == 1:
        return values.cpu()
    parts = [torch.empty_like(values) for _ in range(num_ranks)]
    dist.all_gather(parts, values.contiguous())
    return torch.cat(parts).cpu()
