"""Mistakes of the user, told in one line, with the nearest spelling where there is one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UsageError(Exception):
    """A mistake in what the user typed or wrote in a config; its text is the one line that they see."""


def nearest(word: str, candidates: Iterable[str]) -> str | None:
    """Find the candidate most like ``word``, ignoring case; ``None`` if none is much like it.

    Example:
        >>> nearest("mas", ["SGD", "MaSS"])
        'MaSS'
        >>> nearest("Adam", ["SGD", "MaSS"]) is None
        True
    """
    by_folded = {candidate.casefold(): candidate for candidate in candidates}
    close = difflib.get_close_matches(word.casefold(), by_folded, n=1, cutoff=0.6)
    return by_folded[close[0]] if close else None


def did_you_mean(word: str, candidates: Iterable[str], otherwise: str) -> str:
    """Write the end of a sentence about an unknown ``word``.

    Args:
        word: What the user wrote.
        candidates: What they may have meant.
        otherwise: What to say when nothing is near enough.

    Example:
        >>> did_you_mean("fitt", ["fit", "test"], "see `lightning-sgd --help`")
        "did you mean 'fit'?"
    """
    guess = nearest(word, candidates)
    return f"did you mean '{guess}'?" if guess else otherwise
