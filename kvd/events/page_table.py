"""What has been announced of each page, kept beside the tree while events are on.

Flat arrays by page number, so that no size of pool ever pauses the loop to grow one. With 16
tokens a page: 64 bytes of token ids and about 56 more.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass

import numpy as np

from kvd_shared.refs import PageRefs, TokenIds, page_ids, page_of

NONE = -1


@dataclass(frozen=True, slots=True, weakref_slot=True)
class Origin:
    """What all pages of one namespace have in common on the wire."""

    seed: int
    lora_name: str | None
    cache_salt: str | None


class Cursor:
    """A walk over the pages that were in the table when it began, and still are.

    Both ends are pages in the table's order, or both are NONE: the walk is over.
    """

    __slots__ = ("last", "next")

    def __init__(self, first: int, last: int) -> None:
        self.next, self.last = first, last

    def leave(self, page: int, before: int, after: int) -> None:
        """The page leaves the order, in which it stands between those two."""
        if self.next == page == self.last:
            self.next = self.last = NONE
        elif self.next == page:
            self.next = after
        elif self.last == page:
            self.last = before


class PageTable:
    """Announced pages by number, by hash, and in the order in which they were announced.

    Two pages never have one hash, because a tree holds a prefix once; the caller removes a flushed
    copy, of which it has not been told yet, before it adds the new one.

    Invariants (`check`): `ref[page]` is NONE or the reference announced for it; the pages that
    have one are the `num_pages` of the order, and each is found by its hash.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.num_pages = 0
        self.cursors: list[Cursor] = []
        self.tokens = np.full((num_pages, page_size), 0, np.int32)  # touched now, not in a turn
        self.ref = array("q", [NONE]) * num_pages  # what was announced for the page,
        self.hash = array("q", [NONE]) * num_pages
        self.parent = array("q", [NONE]) * num_pages  # the page before's hash; NONE: prompt's start
        self.origin: list[Origin | None] = [None] * num_pages
        # the order: a ring through one more entry, which stands for both its ends
        self._ends = num_pages
        self._after = array("i", [self._ends]) * (num_pages + 1)
        self._before = array("i", [self._ends]) * (num_pages + 1)
        # pages whose hashes share a bucket, as chains
        self._mask = (1 << num_pages.bit_length()) - 1
        self._head = array("i", [NONE]) * (self._mask + 1)
        self._chain = array("i", [NONE]) * num_pages

    def add(
        self,
        refs: PageRefs,
        digests: list[int],
        parent: int,
        origin: Origin,
        tokens: TokenIds,
    ) -> None:
        """Enter pages that continue each other, the first behind `parent`; last in the order.

        `tokens` are of shape [pages, page_size].
        """
        ref_of, hash_of, parent_of = self.ref, self.hash, self.parent
        head, chain, after, before = self._head, self._chain, self._after, self._before
        mask, last = self._mask, before[self._ends]
        for ref, digest in zip(refs.tolist(), digests, strict=True):
            page, bucket = page_of(ref), digest & mask
            assert ref_of[page] == NONE, f"page {page} is announced twice"
            ref_of[page], hash_of[page], parent_of[page] = ref, digest, parent
            self.origin[page], parent = origin, digest
            chain[page] = head[bucket]
            head[bucket] = page
            before[page], after[last] = last, page
            last = page
        before[self._ends], after[last] = last, self._ends
        self.tokens[page_ids(refs)] = tokens
        self.num_pages += len(digests)

    def in_the_way(self, refs: list[int], digests: list[int]) -> list[int]:
        """References that have to be removed before these can be added: of the same pages, or with
        the same hashes."""
        old: list[int] = []
        ref_of, hash_of, head, chain, mask = (
            self.ref,
            self.hash,
            self._head,
            self._chain,
            self._mask,
        )
        for ref, digest in zip(refs, digests, strict=True):
            if ref_of[page_of(ref)] != NONE:
                old.append(ref_of[page_of(ref)])
            page = head[digest & mask]
            while page != NONE and hash_of[page] != digest:
                page = chain[page]
            if page != NONE:
                old.append(ref_of[page])
        return old

    def remove(self, ref: int) -> int:
        """The hash that is announced no longer; NONE if the reference was not."""
        page = page_of(ref)
        if self.ref[page] != ref:
            return NONE
        digest = self.hash[page]
        self._unchain(page, digest & self._mask)
        before, after = self._before[page], self._after[page]
        self._after[before], self._before[after] = after, before
        for cursor in self.cursors:
            cursor.leave(page, before, after)
        self.ref[page], self.origin[page] = NONE, None
        self.num_pages -= 1
        return digest

    def page_with(self, digest: int) -> int:
        """The page that has this hash, or NONE."""
        page = self._head[digest & self._mask]
        while page != NONE and self.hash[page] != digest:
            page = self._chain[page]
        return page

    def walk(self) -> Cursor:
        """Begin a walk in the order of announcement. End it with `leave`."""
        first, last = self._after[self._ends], self._before[self._ends]
        cursor = Cursor(first, last) if self.num_pages else Cursor(NONE, NONE)
        self.cursors.append(cursor)
        return cursor

    def take(self, cursor: Cursor, count: int) -> list[int]:
        """The next pages of a walk, up to `count`; none: it is over."""
        pages: list[int] = []
        while cursor.next != NONE and len(pages) < count:
            pages.append(cursor.next)
            if cursor.next == cursor.last:
                cursor.next = cursor.last = NONE
            else:
                cursor.next = self._after[cursor.next]
        return pages

    def leave(self, cursor: Cursor) -> None:
        self.cursors.remove(cursor)

    def _unchain(self, page: int, bucket: int) -> None:
        follower = self._chain[page]
        if self._head[bucket] == page:
            self._head[bucket] = follower
            return
        other = self._head[bucket]
        while self._chain[other] != page:
            other = self._chain[other]
        self._chain[other] = follower

    def check(self) -> None:
        """Assert the invariants. O(pages): for tests and audits."""
        order: list[int] = []
        page = self._after[self._ends]
        while page != self._ends:
            assert self._before[self._after[page]] == page, f"page {page}: the ring is broken"
            order.append(page)
            page = self._after[page]
        announced = [page for page in range(len(self.ref)) if self.ref[page] != NONE]
        assert sorted(order) == announced and len(order) == self.num_pages
        for page in order:
            assert self.page_with(self.hash[page]) == page, f"page {page} is not found by its hash"
