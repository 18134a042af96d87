"""The states of a page as `status` and `pages` draw them."""

from __future__ import annotations

from typing import NamedTuple

from kvd_shared.page_state import PageState


class Legend(NamedTuple):
    mark: str
    color: str
    meaning: str


LEGENDS: dict[PageState, Legend] = {
    PageState.FREE: Legend("░", "dim", "holds nothing"),
    PageState.LEASED: Legend("l", "yellow", "given ahead of need, nothing written yet"),
    PageState.WRITING: Legend("w", "yellow", "being written by its session"),
    PageState.ACTIVE: Legend("▓", "blue", "cached, held by one session"),
    PageState.SHARED: Legend("█", "green", "cached, held by two sessions or more"),
    PageState.CACHED: Legend("▒", "cyan", "cached, held by nobody"),
    PageState.DETACHED: Legend("x", "magenta", "flushed and still held: it cannot be matched"),
    PageState.DUPLICATE: Legend("d", "magenta", "complete outside the tree: a duplicate or a tail"),
    PageState.QUARANTINED: Legend("q", "red", "its session is over, its process not proven dead"),
}


def name_of(state: PageState) -> str:
    return state.name.lower()
