"""The states of a page as `status` and `pages` draw them."""

from __future__ import annotations

from typing import NamedTuple


class PageState(NamedTuple):
    name: str
    mark: str
    color: str
    meaning: str


# by their number in the daemon's page map
PAGE_STATES = (
    PageState("free", "░", "dim", "holds nothing"),
    PageState("writing", "w", "yellow", "being written by its session"),
    PageState("active", "▓", "blue", "cached, held by one session"),
    PageState("shared", "█", "green", "cached, held by two sessions or more"),
    PageState("cached", "▒", "cyan", "cached, held by nobody"),
    PageState("duplicate", "d", "magenta", "complete, but another page has the same tokens"),
    PageState("quarantined", "q", "red", "its session is over, its process not proven dead"),
)
