"""The rules that the fields of a body keep. A rule returns the value to use or raises InvalidField.

Nothing is converted or ignored: a sampling option that is silently dropped costs all trust.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Collection, Mapping
from typing import Any

from modelworker.http.errors import InvalidField

Rule = Callable[[str, Any], Any]

_SHOWN_CHARS = 60


def read_fields(body: Mapping[str, Any], rules: Mapping[str, Rule], at: str = "") -> dict[str, Any]:
    """The fields that are present, each through its rule; null is the same as absent.

    `at` goes before the names in messages, for an object inside the body.
    """
    for name in body:
        if name not in rules:
            raise unknown_field(at + name, [at + known for known in rules])
    return {
        name: rules[name](at + name, value) for name, value in body.items() if value is not None
    }


def unknown_field(name: str, known: Collection[str]) -> InvalidField:
    close = difflib.get_close_matches(name[:_SHOWN_CHARS], known, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    return InvalidField(f"{_shown(name)} is no field of this request{hint}", param=name)


def refused(name: str, value: Any, supported: str) -> InvalidField:
    return InvalidField(f"{name} is {_shown(value)}, but must be {supported}", param=name)


def integer(low: int, high: int) -> Rule:
    def rule(name: str, value: Any) -> int:
        if type(value) is not int or not low <= value <= high:  # a bool is an int to isinstance
            raise refused(name, value, f"an integer from {low} to {high}")
        return value

    return rule


def number(low: float, high: float, *, above: bool = False) -> Rule:
    """From `low` to `high`, with `above` without `low` itself."""
    supported = f"a number {f'above {low:g}, up' if above else f'from {low:g}'} to {high:g}"

    def rule(name: str, value: Any) -> float:
        if type(value) not in (int, float) or not low <= value <= high or (above and value == low):
            raise refused(name, value, supported)
        return float(value)

    return rule


def boolean(name: str, value: Any) -> bool:
    if type(value) is not bool:
        raise refused(name, value, "true or false")
    return value


def text(least: int = 0, most: int = 1024) -> Rule:
    def rule(name: str, value: Any) -> str:
        if type(value) is not str or not least <= len(value) <= most:
            raise refused(name, value, f"a string of {least} to {most} characters")
        return value

    return rule


def only(*neutral: Any) -> Rule:
    """For an option that is not implemented: the values that ask for nothing (null is another)."""
    supported = " or ".join([*map(json.dumps, neutral), "null"]) + "; it is not implemented"

    def rule(name: str, value: Any) -> Any:
        for allowed in neutral:
            if value == allowed and (type(value) is bool) == (type(allowed) is bool):
                return value
        raise refused(name, value, supported)

    return rule


def mapping(name: str, value: Any) -> dict[str, Any]:
    if type(value) is not dict:
        raise refused(name, value, "an object")
    return value


def _shown(value: Any) -> str:
    """A value in a message: short, in JSON's spelling, and ASCII only."""
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return f"an array of {len(value)}"
    if isinstance(value, str):
        value = value[: _SHOWN_CHARS - 1] + "…" if len(value) > _SHOWN_CHARS else value
    return json.dumps(value)[: 2 * _SHOWN_CHARS]
