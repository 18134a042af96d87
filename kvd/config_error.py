"""The one error of a configuration that cannot be used."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class ConfigError(Exception):
    """Says which value is wrong, where it was set and what is allowed; exit code 78.

    Not a KvdError: it never travels.
    """


def nearest(word: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown `word`."""
    names = sorted(known)
    close = get_close_matches(word, names, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"known are {', '.join(names)}"
