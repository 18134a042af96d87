"""What every verb of `kvdctl` consists of."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kvd.admin.style import Style

Reply = dict[str, Any]  # as the daemon's reports give it, see each verb


def _no_arguments(parser: ArgumentParser) -> None:
    pass


def _as_it_is(reply: Reply) -> Reply:
    return reply


@dataclass(frozen=True, slots=True)
class Verb:
    """One verb: its request, and its reply as a page for people or as JSON."""

    help: str
    call: Callable[[Namespace], Any]  # the request, a kvd_shared.verbs.Call
    page: Callable[[Reply, Style, Namespace], str]
    arguments: Callable[[ArgumentParser], None] = _no_arguments
    json: Callable[[Reply], Reply] = _as_it_is
