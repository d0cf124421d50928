"""The one form of error sentence, and the two warnings, that the whole package uses."""

from __future__ import annotations

import math
import warnings


class NoEffectWarning(UserWarning):
    """A setting was given that changes nothing in this configuration."""


class OutsideIntendedUseWarning(UserWarning):
    """A method runs outside the conditions for which its paper makes a promise."""


class Words(str):
    """Text that an error message shows without quotes."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def expect(condition: bool, argument: str, expected: str, got: object, remedy: str) -> None:
    """Raise a ``ValueError`` of the house form unless ``condition`` holds.

    Args:
        condition: What must be true.
        argument: Name of the argument as the user spells it.
        expected: What the argument should be, continuing "to be …".
        got: The value that came instead.
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
    """Whether ``value`` is a finite number that is not below ``bound`` (false for NaN).

    Example:
        >>> is_finite_at_least(0.1, 0.0), is_finite_at_least(float("nan"), 0.0)
        (True, False)
    """
    return math.isfinite(value) and value >= bound


def warn_no_effect(message: str) -> None:
    """Tell the user, at their own line, that a setting has no effect."""
    warnings.warn(message, NoEffectWarning, stacklevel=3)


def warn_outside_intended_use(message: str) -> None:
    """Tell the user, at their own line, that the paper promises nothing here."""
    warnings.warn(message, OutsideIntendedUseWarning, stacklevel=3)
