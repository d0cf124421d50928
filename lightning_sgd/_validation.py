"""The one form of error sentence, and the two warnings, that the whole package uses."""

from __future__ import annotations

import contextlib
import math
import sys
import warnings
from typing import TYPE_CHECKING, Any

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


def plain_number(value: Any) -> Any:
    """Turn what a user may give for a number into a number of Python; leave everything else as it is.

    That is a number as text, as YAML reads ``1e-3``, a NumPy scalar, and lists and tuples of these. Checkpoints that
    are loaded with ``weights_only=True`` take no NumPy scalar.

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
