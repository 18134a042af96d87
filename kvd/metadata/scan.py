"""What of the metadata can be believed after a start: whole arrays at a time.

Whatever does not check is dropped with all that stands behind it: to whom it belonged, that is a
miss. Doubt in the tables, or in what says whose a page is, is doubt in everything: ColdStart.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvd.metadata.cold import ColdStart
from kvd.metadata.memory import Metadata
from kvd.metadata.page_states import (
    DOOMED,
    FREE,
    IN_TREE,
    MAX_SESSION,
    OUTSIDE,
    UNRECORDED,
)
from kvd.metadata.records import BORN, INFO, NO_ROOT, PARENT, ROOT, TTL
from kvd.metadata.sessions import SessionEntry
from kvd_shared.namespace import Namespace

Pages = npt.NDArray[np.int64]
TtlOf = Callable[[Namespace], float | None]


@dataclass(slots=True)
class Scan:
    """Pages are numbers; together the four groups are all pages of the pool, each once."""

    roots: dict[int, Namespace]  # that are live, by id
    weights: dict[str | None, int]  # lowest valid version by model (None: of all)
    sessions: dict[int, SessionEntry]
    free: Pages
    private: dict[int, Pages]  # by session
    matchable: Pages  # parents before children
    depths: Pages  # of those: pages before each
    parents: Pages  # of those: the place of its parent among them; -1: the start of the prompt
    quarantined: Pages  # sealed or dropped: somebody may be reading them
    tails: dict[int, int]  # of those, by page: how many tokens one that is sealed outside has
    dropped: Counter[str]  # why pages of the tree are not matchable any more


def scan(meta: Metadata, now: float, ttl_of: TtlOf) -> Scan:
    """`now`: time.monotonic(). `ttl_of`: how long a namespace's KV may be unused, in seconds, where
    its publisher had no wish. Raises ColdStart. Changes no page's state."""
    roots, weights, sessions = meta.roots.load(), meta.weights.load(), meta.sessions.load()
    floor = weights.get(None, 0)
    live = {
        root_id: namespace
        for root_id, namespace in roots.items()
        if namespace.weights_version >= max(floor, weights.get(namespace.model, 0))
    }
    owners = meta.pages.owners()
    free = np.flatnonzero(owners == FREE)
    private = _private(owners, sessions)
    in_tree = np.flatnonzero(owners == IN_TREE)
    dropped: Counter[str] = Counter()
    matchable, depths, parents = _believable(meta, in_tree, live, now, ttl_of, dropped)
    for owner, why in ((DOOMED, "expired"), (UNRECORDED, "unrecorded")):
        if count := int(np.count_nonzero(owners == owner)):
            dropped[why] += count
    held = (owners > MAX_SESSION) & (owners != FREE)
    held[matchable] = False
    quarantined = np.flatnonzero(held)
    return Scan(
        live,
        weights,
        sessions,
        free,
        private,
        matchable,
        depths,
        parents,
        quarantined,
        _tails(meta, np.flatnonzero(owners == OUTSIDE)),
        dropped,
    )


def _private(owners: Pages, sessions: dict[int, SessionEntry]) -> dict[int, Pages]:
    named = np.flatnonzero((owners != FREE) & (owners < MAX_SESSION))
    unknown = np.flatnonzero((owners >= MAX_SESSION) & (owners < DOOMED))
    if len(unknown):
        raise ColdStart("pages", f"page {unknown[0]} has owner {owners[unknown[0]]:#x}: none such")
    if not len(named):
        return {}
    order = named[np.argsort(owners[named], kind="stable")]
    ids, starts = np.unique(owners[order], return_index=True)
    found: dict[int, Pages] = {}
    for session_id, pages in zip(ids.tolist(), np.split(order, starts[1:]), strict=True):
        if session_id not in sessions:
            raise ColdStart("pages", f"page {pages[0]} belongs to session {session_id}: none such")
        found[session_id] = pages
    return found


def _believable(
    meta: Metadata,
    pages: Pages,
    roots: dict[int, Namespace],
    now: float,
    ttl_of: TtlOf,
    dropped: Counter[str],
) -> tuple[Pages, Pages, Pages]:
    """Of the pages that were in the tree, those that can be matched: parents first, with their
    depths and the places of their parents."""
    intact = meta.records.are_intact(pages)
    dropped["damaged"] += int(len(pages) - np.count_nonzero(intact))
    pages = pages[intact]
    rows = meta.records.rows
    known = np.array(sorted(roots), dtype=np.uint64)
    of_root = rows[pages, ROOT]
    at = np.searchsorted(known, of_root)
    at[at == len(known)] = 0
    there = known[at] == of_root if len(known) else np.zeros(len(pages), dtype=bool)
    dropped["root_gone"] += int(len(pages) - np.count_nonzero(there))
    pages, of_root, at = pages[there], of_root[there], at[there]

    # inf stands for no end
    ttl_s = rows[pages, TTL].view(np.float64)
    defaults = [ttl_of(roots[root_id]) for root_id in known.tolist()]
    default_s = np.array([math.inf if s is None else s for s in defaults], dtype=np.float64)
    ttl_s = np.where(np.isnan(ttl_s), default_s[at] if len(known) else math.inf, ttl_s)
    fresh = rows[pages, BORN].view(np.float64) + ttl_s > now
    dropped["expired"] += int(len(pages) - np.count_nonzero(fresh))

    # Behind whom: the parent is to be there, in the generation named, under the same root.
    count = len(pages)
    place = np.full(len(rows), -1, dtype=np.int64)
    place[pages] = np.arange(count)
    parent_refs = rows[pages, PARENT].view(np.int64)
    first = parent_refs == -1
    parent_pages = parent_refs & 0xFFFF_FFFF
    inside = first | ((parent_refs >= 0) & (parent_pages < len(rows)))
    parent_pages = np.where(inside & ~first, parent_pages, 0)
    parents = np.where(first, count, place[parent_pages])
    good = fresh & inside & (first | (parents >= 0))
    parents = np.where(parents < 0, count, parents)
    good &= first | (meta.pages.current[parent_pages] == parent_refs)
    good &= first | (np.append(of_root, np.uint64(0))[parents] == of_root)
    good, depths = _from_the_start(good, parents)
    dropped["orphaned"] += int(np.count_nonzero(fresh) - np.count_nonzero(good))

    order = np.flatnonzero(good)
    order = order[np.argsort(depths[order], kind="stable")]
    new_place = np.full(count + 1, -1, dtype=np.int64)
    new_place[order] = np.arange(len(order))
    return pages[order], depths[order], new_place[parents[order]]


def _from_the_start(
    good: npt.NDArray[np.bool_], parents: Pages
) -> tuple[npt.NDArray[np.bool_], Pages]:
    """Who is good together with all before it, and how many those are. Each round looks twice as
    far up; place `len(good)` is the start of all prompts, which a ring never comes to."""
    count = len(good)
    ok = np.append(good, True)
    far = np.append(parents, count)
    depths = np.append(np.where(parents == count, 0, 1), 0)
    for _ in range(max(count, 1).bit_length() + 1):
        if (far == count).all():
            break
        ok &= ok[far]
        depths = depths + depths[far]
        far = far[far]
    ok &= far == count
    return ok[:count], depths[:count]


def _tails(meta: Metadata, pages: Pages) -> dict[int, int]:
    """Tokens of the pages that are sealed outside the tree, as far as their rows say so."""
    if not len(pages):
        return {}
    rows = meta.records.rows
    good = meta.records.are_intact(pages) & (rows[pages, ROOT] == NO_ROOT)
    tokens = (rows[pages, INFO] >> np.uint64(32)) & np.uint64(0xFFFF)
    return dict(zip(pages[good].tolist(), tokens[good].tolist(), strict=True))
