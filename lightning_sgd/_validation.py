"""The one form of error sentence, and the two warnings, that the whole package uses."""

from __future__ import annotations

import contextlib
import difflib
import math
import sys
import warnings
from types import NoneType
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

import numpy as np

if TYPE_CHECKING:
    from types import FrameType

_LIBRARIES = frozenset(
    {
        "lightning_sgd",
        "torch",
        "torchmetrics",
        "lightning",
        "pytorch_lightning",
        "lightning_fabric",
        "lightning_utilities",
        "jsonargparse",
        "contextlib",
        "functools",
        "multiprocessing",
        "threading",
    }
)
"""Top-level packages that stand between a line of the user and a line of ours."""


class NoEffectWarning(UserWarning):
    """A setting was given that changes nothing in this configuration."""


class OutsideIntendedUseWarning(UserWarning):
    """A method runs outside the conditions for which its paper makes a promise."""


class Words(str):
    """Text that an error shows without quotes: a description, where the value itself would say nothing.

    Example:
        >>> Words("a sparse one")
        a sparse one
    """

    __slots__ = ()

    def __repr__(self) -> str:
        """Return the bare text."""
        return str(self)


def expect(condition: bool, argument: str, expected: str, got: object, remedy: str) -> None:
    """Raise a ``ValueError`` of the house form unless ``condition`` holds.

    Args:
        condition: What must be true.
        argument: Name of the argument as the user spells it.
        expected: What the argument should be, continuing "to be …".
        got: The value that came instead, or :class:`Words` that describe it.
        remedy: One sentence that tells the user what to change.

    Raises:
        ValueError: If ``condition`` is false.

    Example:
        >>> expect(False, "alpha", "in (0, 1)", 2.0, "Try the default, 0.05.")
        Traceback (most recent call last):
        ...
        ValueError: Expected `alpha` to be in (0, 1), got 2.0. Try the default, 0.05.
    """
    if not condition:
        raise ValueError(f"Expected `{argument}` to be {expected}, got {got!r}. {remedy}")


def expect_one_of(
    value: object, choices: Any, argument: str, remedy: str = "Choose one of them."
) -> None:
    """Raise a ``ValueError`` unless ``value`` is one of the values of a ``Literal``; suggest the nearest of them.

    The command line checks such arguments by their types; Python does not.

    Args:
        value: What the user gave.
        choices: A ``Literal``, or a union of them, possibly with ``None``.
        argument: Name of the argument as the user spells it.
        remedy: What the error recommends where no value is similar.

    Raises:
        ValueError: If the value is none of the choices.

    Example:
        >>> expect_one_of("bf16", Literal["full", "bfloat16"], "wire_dtype")
        Traceback (most recent call last):
        ...
        ValueError: Expected `wire_dtype` to be one of full, bfloat16, got 'bf16'. Did you mean 'bfloat16'?
    """
    words = literal_values(choices)
    # Scalars alone: arrays compare element by element.
    if isinstance(value, (str, int, float, np.generic, NoneType)) and value in words:
        return
    texts = [word for word in words if isinstance(word, str)]
    # The cut-off finds abbreviations such as bf16, and leaves out words that share only some letters.
    near = difflib.get_close_matches(str(value).lower(), texts, n=1, cutoff=0.5)
    remedy = f"Did you mean {near[0]!r}?" if near else remedy
    expect(False, argument, f"one of {', '.join(map(str, words))}", value, remedy)


def literal_values(choices: Any) -> tuple[Any, ...]:
    """List the values of a ``Literal``, or of a union with ``Literal`` types, in order.

    Example:
        >>> literal_values(Literal["auto", "svd"] | None)
        ('auto', 'svd', None)
    """
    if choices is NoneType:
        return (None,)
    if get_origin(choices) is Literal:
        return get_args(choices)
    return tuple(word for part in get_args(choices) for word in literal_values(part))


def is_finite_at_least(value: float, bound: float) -> bool:
    """Return whether ``value`` is a finite number that is not below ``bound``; false for NaN.

    Example:
        >>> is_finite_at_least(0.1, 0.0), is_finite_at_least(float("nan"), 0.0)
        (True, False)
    """
    try:
        return math.isfinite(value) and value >= bound
    except TypeError:  # text or None, from YAML
        return False


def is_whole(value: object, least: int = 0) -> bool:
    """Return whether ``value`` is a whole number of at least ``least``.

    Example:
        >>> is_whole(4), is_whole(2.5), is_whole("4"), is_whole(0, least=1)
        (True, False, False, False)
    """
    return isinstance(value, (int, float)) and value >= least and value % 1 == 0


def expect_whole(value: object, least: int, argument: str, remedy: str) -> None:
    """Raise a ``ValueError`` unless ``value`` is a whole number of at least ``least``."""
    kind = "" if is_whole(value, -sys.maxsize) else "a whole number of "
    expect(is_whole(value, least), argument, f"{kind}at least {least}", value, remedy)


def plain_number(value: Any) -> Any:
    """Turn what a user may give for a number into a number of Python; leave everything else as it is.

    That is a number as text, as YAML reads ``1e-3``, a NumPy scalar, and lists, tuples and dictionaries of these.
    Checkpoints that are loaded with ``weights_only=True`` take no NumPy scalar.

    Example:
        >>> plain_number("1e-3"), plain_number(np.float32(0.5)), plain_number(["0.9", 1])
        (0.001, 0.5, [0.9, 1])
    """
    if isinstance(value, str):
        # Integers first: a count must not become 1.0.
        for kind in (int, float):
            with contextlib.suppress(ValueError):
                return kind(value)
    elif isinstance(value, np.generic):
        return value.item()
    elif type(value) is dict:
        return {plain_number(key): plain_number(number) for key, number in value.items()}
    elif type(value) in (list, tuple):
        return type(value)(map(plain_number, value))
    return value


def warn_no_effect(message: str) -> None:
    """Tell the user, at their own line, that a setting has no effect."""
    warn_at_user_line(message, NoEffectWarning)


def warn_outside_intended_use(message: str) -> None:
    """Tell the user, at their own line, that the paper promises nothing here."""
    warn_at_user_line(message, OutsideIntendedUseWarning)


def warn_at_user_line(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn with the file and line of the user's code: what built the object, or called ``fit``.

    A fixed ``stacklevel`` cannot know how many frames of this package, of torch and of Lightning lie between.
    """
    frame = _user_frame()
    warnings.warn_explicit(
        message,
        category,
        filename=frame.f_code.co_filename,
        lineno=frame.f_lineno,
        module=frame.f_globals.get("__name__"),
        # Python keeps here what it has shown already, so that "once per line" means the user's line.
        registry=frame.f_globals.setdefault("__warningregistry__", {}),
    )


def _user_frame() -> FrameType:
    """Find the innermost frame outside the libraries, or outside this package if a thread has no such frame."""
    caller = _innermost_outside(frozenset({"lightning_sgd"}))
    return _innermost_outside(_LIBRARIES, default=caller)


def _innermost_outside(packages: frozenset[str], default: FrameType | None = None) -> FrameType:
    # Compared by module name, not by file: callbacks and strategies are links to folders outside the package's, and
    # the methods that a dataclass generates have no file.
    frame: FrameType | None = sys._getframe()
    last = frame
    while frame is not None:
        if str(frame.f_globals.get("__name__")).partition(".")[0] not in packages:
            return frame
        last, frame = frame, frame.f_back
    found = default or last
    assert found is not None
    return found
