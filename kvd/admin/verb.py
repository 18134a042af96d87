"""What every verb of `kvdctl` consists of."""

from __future__ import annotations

from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kvd.admin.style import Style
from kvd_shared import exit_codes

Reply = dict[str, Any]  # as the daemon's reports give it, see each verb


class UsageError(Exception):
    """Arguments that make no request, as argparse cannot know. The message says what would."""


def _no_arguments(parser: ArgumentParser) -> None:
    pass


def _as_it_is(reply: Reply) -> Reply:
    return reply


def _ok(reply: Reply) -> int:
    return exit_codes.OK


def as_observer(args: Namespace) -> str:
    """The role of what only reads and tells of nobody's prompt."""
    return "observer"


def as_admin(args: Namespace) -> str:
    """The role of everything else."""
    return "admin"


def pool_argument(parser: ArgumentParser) -> None:
    parser.add_argument("--pool", metavar="NAME", help="which pool, if there are several")


def positive(text: str) -> int:
    """An argument that counts something."""
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"{text!r} must be a whole number of at least 1")
    return int(text)


def whole(text: str) -> int:
    """An argument that is a number from 0."""
    if not text.isdecimal():
        raise ArgumentTypeError(f"{text!r} must be a whole number of at least 0")
    return int(text)


def seconds(text: str) -> float:
    """An argument that is a time to wait."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 86400:
        raise ArgumentTypeError(f"{text!r} must be above 0 and at most 86400 (seconds)")
    return value


@dataclass(frozen=True, slots=True)
class Verb:
    """One verb: its request, and its reply as a page for people or as JSON.

    `look`: a question to ask first; `call` finds its reply in the arguments as `seen`.
    """

    help: str
    call: Callable[[Namespace], Any]  # the request, a kvd_shared.verbs.Call; may raise UsageError
    page: Callable[[Reply, Style, Namespace], str]
    arguments: Callable[[ArgumentParser], None] = _no_arguments
    json: Callable[[Reply], Reply] = _as_it_is
    look: Callable[[Namespace], Any] | None = None
    code: Callable[[Reply], int] = _ok
    role: Callable[[Namespace], str] = as_admin  # to attach in
