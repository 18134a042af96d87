"""What the cache core promises, said again in plain dicts and lists, page by page.

There is no compressed tree here: `cached` maps a namespace and all tokens up to a page's end to
that page. A *path* is a tuple of pieces, each the token bytes of one page. Who is protected and
what may be evicted is computed anew from the holds each time.

Two choices are the core's and taken over if they are legal: which free pages an allocation gets,
and in which order pages become evictable that a dying session drops all at once.
"""

from __future__ import annotations

from collections import Counter

from kvd_shared.errors import BadRequest, NoPages, NotHeld, SessionEnded
from kvd_shared.refs import GENERATION
from tests.kvd.reference_queue import ReferenceQueue

Path = tuple[bytes, ...]
Key = tuple[str, Path]


class ReferenceModel:
    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self.free = set(range(num_pages))  # references: generation << 32 | page
        self.cached: dict[Key, int] = {}
        self.holds: dict[int, Counter[int]] = {}  # by session: of cached and of its private pages
        self.ended: set[int] = set()
        self.lru: list[int] = []  # the cached pages that may be evicted, the next one first
        self.queue = ReferenceQueue()

    def live(self, session: int) -> None:
        if session in self.ended:
            raise SessionEnded("")

    def end_session(self, session: int) -> None:
        self.ended.add(session)
        self.queue.end_session(session)

    def release_session(self, session: int, eviction_order: list[int]) -> None:
        self.end_session(session)
        held = self.holds.pop(session)
        self.free |= {ref + GENERATION for ref in held if ref not in self.cached.values()}
        assert eviction_order[: len(self.lru)] == self.lru, "what was there first goes first"
        assert sorted(eviction_order) == sorted(self.evictable())
        self.lru = eviction_order
        for (name, path), ref in self.cached.items():
            parent = self.cached.get((name, path[:-1]))
            if parent in self.lru:
                assert self.lru.index(ref) < self.lru.index(parent), "a parent before its child"

    def evictable(self) -> dict[int, int]:
        """Depth of each cached page that nobody holds, nor any page that continues it."""
        held = set().union(*self.holds.values())
        of = [key for key, ref in self.cached.items() if ref in held]
        kept = {(name, path[:i]) for name, path in of for i in range(1, len(path) + 1)}
        return {ref: len(key[1]) for key, ref in self.cached.items() if key not in kept}

    def hold(self, session: int, refs: list[int]) -> None:
        self.holds[session].update(refs)
        evictable = self.evictable()
        self.lru = [ref for ref in self.lru if ref in evictable]

    def must_hold(self, session: int, refs: list[int]) -> None:
        self.live(session)
        if len(set(refs)) != len(refs):
            raise BadRequest("")
        if not all(self.holds[session][ref] for ref in refs):
            raise NotHeld("")

    def share(self, session: int, refs: list[int]) -> None:
        self.must_hold(session, refs)
        self.hold(session, refs)

    def give_back(self, session: int, refs: list[int]) -> None:
        """One by one. What a page's last hold alone protected can be evicted, the deepest first."""
        self.must_hold(session, refs)
        for ref in refs:
            self.holds[session] -= Counter([ref])
            if ref not in self.cached.values() and not self.holds[session][ref]:
                self.free.add(ref + GENERATION)
            depth = self.evictable()
            self.lru += sorted(depth.keys() - set(self.lru), key=lambda r: -depth[r])

    def walk(self, name: str, path: Path) -> list[int]:
        keys = [(name, path[:length]) for length in range(1, len(path) + 1)]
        return [self.cached[key] for key in keys if key in self.cached]  # children go first

    def match(self, session: int, name: str, path: Path) -> list[int]:
        """`path` is what may match: the pages before the prompt's last token."""
        self.live(session)
        found = self.walk(name, path)
        self.hold(session, found)
        return found

    def acquire(
        self, session: int, name: str, path: Path, count: int, number: int | None, new: list[int]
    ) -> list[int]:
        found = self.walk(name, path)
        missing = max(0, count - len(found))
        self.admit(session, count, number, missing + sum(ref in self.lru for ref in found))
        self.hold(session, found)
        return found + self.take(session, missing, new)

    def allocate(self, session: int, count: int, number: int | None, new: list[int]) -> list[int]:
        self.admit(session, count, number, count)
        return self.take(session, count, new)

    def admit(self, session: int, count: int, number: int | None, wanted: int) -> None:
        """Of the pages that can be had, `wanted` will be had no longer."""
        self.live(session)
        if not 1 <= count <= self.num_pages:
            raise BadRequest("")
        request = None if number is None else self.queue.get(session, number)
        allowed = max(0, len(self.free) + len(self.lru) - self.queue.reserved_from(request))
        if wanted > allowed:
            if request is not None:
                self.queue.refused(request, wanted)
            raise NoPages("", missing=wanted - allowed)
        if request is not None:
            self.queue.served(request)

    def take(self, session: int, count: int, new: list[int]) -> list[int]:
        while len(self.free) < count:  # evict what is short, and no more
            gone = self.lru.pop(0)
            self.cached = {key: ref for key, ref in self.cached.items() if ref != gone}
            self.free.add(gone + GENERATION)
        assert len(new) == count and set(new) <= self.free, "those pages were not free"
        self.free -= set(new)
        self.holds[session].update(new)
        return new

    def publish(
        self, session: int, name: str, path: Path, refs: list[int], after: int | None
    ) -> list[int]:
        start: Path = ()
        if after is not None:
            self.must_hold(session, [after])
            above, start = {ref: key for key, ref in self.cached.items()}.get(after, ("", ()))
            if above != name:
                raise BadRequest("")
        keys = [(name, (*start, *path[: i + 1])) for i in range(len(path))]
        own = [ref for key, ref in zip(keys, refs, strict=True) if self.cached.get(key) != ref]
        if not refs or set(own) & set(self.cached.values()):
            raise BadRequest("")
        self.must_hold(session, refs)
        canonical = [self.cached.setdefault(key, ref) for key, ref in zip(keys, refs, strict=True)]
        self.hold(session, [c for c, ref in zip(canonical, refs, strict=True) if c != ref])
        return canonical
