"""Restore a module, a data loader and the random states after passes that only measure."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any, TypeAlias

import numpy as np
import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.data import DataLoader, Dataset, Sampler

Undo: TypeAlias = Callable[[], object]

MAX_ENTRIES = 10_000
"""Entries of longer containers are kept, but what happens inside each of them is not."""

_ATOMS = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)
_NOT_STATE = (
    type,
    ModuleType,
    FunctionType,
    MethodType,
    BuiltinFunctionType,
    partial,
    Trainer,
    LightningDataModule,
    Callback,
    Logger,
    torch.optim.Optimizer,
)
_LIBRARIES = {
    *("lightning", "lightning_fabric", "pytorch_lightning", "torch", "logging"),
    *("asyncio", "concurrent", "multiprocessing", "threading", "_thread", "weakref"),
}
"""Objects of these packages are machinery, not state of a training step; modules, data sets and samplers are."""
_HOOKS = vars(nn.Module()).keys() - {"_parameters", "_buffers", "_modules"}
_CONTAINERS = (list, dict, set, deque, bytearray)
_GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)


@contextmanager
def module_state_kept(module: nn.Module, loader: DataLoader[Any] | None = None) -> Iterator[None]:
    """Restore afterwards, also after an exception, what a training step and loading of batches may change.

    Of everything that is reached from the module, by attributes and containers, also inside plain objects and modules
    that are not registered:

    - parameters and buffers, trained or frozen, other tensors and NumPy arrays get their old content,
    - ``torch.Generator``, NumPy's generators and ``random.Random`` their old state,
    - lists, dictionaries, sets, deques and queues their old entries, attributes their old values.

    Of the loader, its samplers and its data set the same, but for the content of the data set's tensors and arrays.
    Open files and iterators cannot be restored, see :func:`iterator_in`; nor can state outside of Python objects.

    Memory: a copy of all these tensors and arrays, and of the entries of containers, until the end of the block.
    """
    undo: list[Undo] = []
    seen: dict[int, Any] = {}
    try:
        if loader is not None:
            collate = getattr(loader.collate_fn, "__self__", loader.collate_fn)
            data = [loader.dataset, collate]
            undo += _undo(_reached(data, seen), with_tensors=False)
            undo += _undo(_reached([loader], seen))
        undo += _undo(_reached([module], seen))
        yield
    finally:
        with torch.no_grad():
            for restore in undo:
                restore()


def iterator_in(module: nn.Module) -> str | None:
    """Return the type of an iterator that the module holds and nothing can set back; ``None`` if there is none."""
    reached = _reached([module], {})
    # An iterator that is an object with attributes is restored as any other object.
    lost = (
        each for each in reached if isinstance(each, Iterator) and not hasattr(each, "__dict__")
    )
    return next((type(each).__name__ for each in lost), None)


def _reached(roots: Iterable[Any], seen: dict[int, Any]) -> Iterator[Any]:
    """Yield each object that may hold state once, those that refer to others first.

    Args:
        roots: Where to begin.
        seen: What was reached before, by identity; is added to. It keeps the objects alive, so that no identity is
            used twice.
    """
    waiting = list(roots)
    while waiting:
        value = waiting.pop()
        if isinstance(value, _ATOMS) or id(value) in seen or _is_no_state(value):
            continue
        seen[id(value)] = value
        yield value
        if isinstance(value, (Tensor, np.ndarray, *_GENERATORS)):
            continue
        if isinstance(value, (list, tuple, set, deque)) and len(value) <= MAX_ENTRIES:
            waiting += value
        elif isinstance(value, dict) and len(value) <= MAX_ENTRIES:
            waiting += value.values()
        attributes = getattr(value, "__dict__", {})
        hooks = _HOOKS if isinstance(value, nn.Module) else ()
        waiting += [content for name, content in attributes.items() if name not in hooks]


def _is_no_state(value: object) -> bool:
    if isinstance(value, (nn.Module, Tensor, Dataset, Sampler, DataLoader, *_CONTAINERS)):
        return False
    if isinstance(value, _GENERATORS):
        return False
    return isinstance(value, _NOT_STATE) or type(value).__module__.partition(".")[0] in _LIBRARIES


def _undo(values: Iterable[Any], with_tensors: bool = True) -> Iterator[Undo]:
    """Yield what restores each object."""
    for value in values:
        if isinstance(value, Tensor):
            if with_tensors and not (is_lazy(value) or value.is_meta or _is_sharded(value)):
                yield _undo_tensor(value)
        elif isinstance(value, np.ndarray):
            if with_tensors and value.flags.writeable:
                yield partial(_restore_array, value, value.copy())
        elif isinstance(value, _GENERATORS):
            yield _undo_generator(value)
        else:
            if isinstance(value, _CONTAINERS):
                yield partial(_restore_container, value, value.copy())
            if isinstance(attributes := getattr(value, "__dict__", None), dict):
                yield partial(_restore_container, attributes, attributes.copy())


def _undo_generator(generator: Any) -> Undo:
    if isinstance(generator, np.random.Generator):
        bits = generator.bit_generator
        return partial(setattr, bits, "state", bits.state)
    if isinstance(generator, random.Random):
        return partial(generator.setstate, generator.getstate())
    return partial(generator.set_state, generator.get_state())


def _is_sharded(tensor: Tensor) -> bool:
    """Return whether a library gathers and frees this tensor as it likes: FSDP or DeepSpeed."""
    return any(hasattr(tensor, name) for name in ("to_local", "_local_shard", "ds_id"))


def _undo_tensor(tensor: Tensor) -> Undo:
    with torch.no_grad():
        if tensor.layout != torch.strided:
            return partial(_restore_sparse, tensor, tensor.detach().clone())
        # `data` shares the memory that optimizers and flat buffers know, but not the version counter.
        data = tensor.data
        return partial(_restore_tensor, tensor, data, data.clone())


def _restore_tensor(tensor: Tensor, data: Tensor, content: Tensor) -> None:
    moved = tensor.data_ptr() != data.data_ptr() or tensor.stride() != data.stride()
    if moved or tensor.shape != data.shape:  # by `tensor.data = …`
        tensor.data = data
    # By content: `.data` and batch normalisation change values without incrementing the version counter. On an
    # accelerator the comparison would wait for the device, and copying the same values changes nothing.
    if (data.device.type == "cuda" and not _overlaps(data)) or not torch.equal(data, content):
        data.copy_(content)


def _overlaps(tensor: Tensor) -> bool:
    """Return whether several elements share memory, as after ``expand``; nothing can write to these."""
    return 0 in tensor.stride() and tensor.numel() > 1


def _restore_sparse(tensor: Tensor, content: Tensor) -> None:
    pairs = zip(_parts(tensor), _parts(content), strict=True)
    if not all(torch.equal(now, before) for now, before in pairs):
        tensor.copy_(content)


def _parts(tensor: Tensor) -> list[Tensor]:
    """Return the dense tensors that a sparse tensor consists of."""
    if tensor.layout == torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    by_row = tensor.layout in (torch.sparse_csr, torch.sparse_bsr)
    indices = ("crow_indices", "col_indices") if by_row else ("ccol_indices", "row_indices")
    return [getattr(tensor, name)() for name in (*indices, "values")]


def _restore_array(array: np.ndarray[Any, Any], content: np.ndarray[Any, Any]) -> None:
    if array.shape != content.shape:
        array.resize(content.shape, refcheck=False)
    array[...] = content


def _restore_container(container: Any, content: Any) -> None:
    # By identity: entries need not be comparable, and one that was replaced by an equal one has changed.
    if isinstance(container, set) and container == content:
        return
    if len(container) == len(content) and all(map(_is, container, content)):
        values = isinstance(container, dict)
        if not values or all(map(_is, container.values(), content.values())):
            return
    if isinstance(container, (list, bytearray)):
        container[:] = content
        return
    container.clear()
    if isinstance(container, deque):
        container.extend(content)
    else:
        container.update(content)


def _is(first: object, second: object) -> bool:
    return first is second


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
