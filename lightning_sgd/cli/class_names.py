"""The classes that an annotated argument accepts, and the names by which a user can give them."""

from __future__ import annotations

import collections.abc
import enum
import importlib
import inspect
import sys
from collections.abc import Iterator, Sequence
from typing import Any, get_args, get_origin

from lightning_sgd.cli.errors import UsageError

PLAIN_TYPES = (str, int, float)


def known_classes(hint: Any) -> list[type]:
    """List every imported class that can be given for an argument annotated with ``hint``.

    Example:
        >>> from torch.optim import Optimizer
        >>> "Adam" in [cls.__name__ for cls in known_classes(Optimizer | None)]
        True
        >>> known_classes(int | str)
        []
    """
    classes = (
        cls for base in _alternatives(hint) if _can_have_plugins(base) for cls in _family(base)
    )
    return list(dict.fromkeys(classes))


def takes_plain_values(hint: Any) -> bool:
    """Tell whether a bare word can be something else than the name of a class.

    Example:
        >>> from lightning.pytorch.strategies import Strategy
        >>> takes_plain_values(str | Strategy), takes_plain_values(Strategy | None)
        (True, False)
    """
    return any(alternative in PLAIN_TYPES for alternative in _alternatives(hint))


def resolve(name: str, classes: Sequence[type]) -> object | None:
    """Find what ``name`` stands for: the bare name of a known class, or the path of anything importable.

    Args:
        name: What the user wrote.
        classes: The known classes.

    Raises:
        UsageError: If the module is there but fails when it is imported.
    """
    if "." not in name:
        return next((cls for cls in classes if cls.__name__ == name), None)
    module, _, attribute = name.rpartition(".")
    try:
        return getattr(importlib.import_module(module), attribute, None)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}."):
            return None
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UsageError(f"'{name}' cannot be imported: {reason}") from error


def class_path(cls: type) -> str:
    """Find the shortest path from which ``cls`` can be imported.

    Example:
        >>> from lightning.pytorch.callbacks import ModelCheckpoint
        >>> class_path(ModelCheckpoint)
        'lightning.pytorch.callbacks.ModelCheckpoint'
    """
    parts = cls.__module__.split(".")
    modules = (".".join(parts[:length]) for length in range(1, len(parts) + 1))
    exporting = (
        name for name in modules if getattr(sys.modules.get(name), cls.__name__, None) is cls
    )
    return f"{next(exporting, cls.__module__)}.{cls.__name__}"


def _alternatives(hint: Any) -> Iterator[type]:
    """List the plain classes within unions, containers and the results of callables."""
    if get_origin(hint) is collections.abc.Callable:
        yield from _alternatives(get_args(hint)[-1])
    elif get_args(hint):
        for argument in get_args(hint):
            yield from _alternatives(argument)
    elif isinstance(hint, type):
        yield hint


def _can_have_plugins(base: type) -> bool:
    """Tell whether YAML gives objects of this class by class path; numbers, paths, dates and enums are written out."""
    in_standard_library = base.__module__.partition(".")[0] in sys.stdlib_module_names
    return not in_standard_library and not issubclass(base, enum.Enum)


def _family(base: Any) -> Iterator[type]:
    """List ``base`` and its subclasses, as far as a user can name and build them."""
    path = f"{base.__module__}.{base.__qualname__}"
    if not (inspect.isabstract(base) or "._" in path or "<locals>" in path):
        yield base
    for subclass in base.__subclasses__():
        yield from _family(subclass)
