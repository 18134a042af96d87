"""The cache core and its reference model side by side: each operation goes to both."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np

from kvd.cache import CacheManager
from kvd.cache_check import check_cache
from kvd.session import Session
from kvd_shared.errors import BadRequest, KvdError, NoPages
from kvd_shared.namespace import Namespace
from kvd_shared.refs import TOKEN_BYTES, refs_from_bytes
from tests.kvd.reference_model import Key, Path, ReferenceModel

PAGE_SIZE = 8
MOST_BEGUN_AT_ONCE = 4096
PAGE_BYTES = PAGE_SIZE * TOKEN_BYTES
Outcome = tuple[str, Any]


def page_tokens(tokens: str) -> bytes:
    """One page of tokens for each letter: "ab" are 8 times 97 and 8 times 98."""
    return b"".join(np.full(PAGE_SIZE, ord(t), dtype="<i4").tobytes() for t in tokens)


def packed(refs: list[int]) -> bytes:
    return np.array(refs, dtype="<i8").tobytes()


def unpacked(refs: bytes) -> list[int]:
    return refs_from_bytes(refs).tolist()


def path_of(tokens: bytes) -> Path:
    return tuple(tokens[i : i + PAGE_BYTES] for i in range(0, len(tokens), PAGE_BYTES))


class PairedCache:
    """Each method performs one operation on both, asserts that answer and state agree, and returns
    the answer as ("ok", value) or (error code, missing pages)."""

    def __init__(self, num_pages: int, num_sessions: int = 3) -> None:
        self.core = CacheManager(num_pages, PAGE_SIZE)
        self.model = ReferenceModel(num_pages)
        self.now = 0.0
        self.sessions: dict[int, Session] = {}
        for session in range(1, num_sessions + 1):
            self.open(session)

    def open(self, session: int) -> None:
        self.sessions[session] = self.core.open_session(session, f"worker {session}", self.now)
        self.model.holds[session] = Counter()

    # --- operations

    def begin(self, session: int, count: int) -> Outcome:
        def model(_: Any) -> int:
            if not 1 <= count <= MOST_BEGUN_AT_ONCE:
                raise BadRequest("")
            return self.model.queue.begin(session, count)

        return self._both(lambda: self.core.begin(self.sessions[session], count), model)

    def end(self, session: int, number: int) -> Outcome:
        return self._both(
            lambda: self.core.end(self.sessions[session], number),
            lambda _: self.model.queue.end(session, number),
        )

    def yielded(self, session: int, number: int) -> Outcome:
        return self._both(
            lambda: self.core.yielded(self.sessions[session], number),
            lambda _: self.model.queue.yielded(session, number),
        )

    def match(self, session: int, name: str, tokens: bytes) -> Outcome:
        def core() -> list[int]:
            asked = self.core.probe(self.sessions[session], Namespace(model=name), tokens)
            found = self.core.match(self.sessions[session], Namespace(model=name), tokens)
            assert asked == found.matched_tokens == found.num_matched_pages * PAGE_SIZE
            assert (found.stop == "limit") == (found.num_matched_pages == len(matchable(tokens)))
            return unpacked(found.refs)

        return self._both(core, lambda _: self.model.match(session, name, matchable(tokens)))

    def acquire(
        self, session: int, name: str, tokens: bytes, num_pages: int, number: int | None
    ) -> Outcome:
        matched = 0

        def core() -> list[int]:
            nonlocal matched
            namespace = Namespace(model=name)
            found = self.core.acquire(self.sessions[session], namespace, tokens, num_pages, number)
            matched = found.num_matched_pages
            return unpacked(found.refs)

        return self._both(
            core,
            lambda got: self.model.acquire(
                session, name, matchable(tokens), num_pages, number, (got or [])[matched:]
            ),
        )

    def allocate(self, session: int, count: int, number: int | None) -> Outcome:
        return self._both(
            lambda: unpacked(self.core.allocate(self.sessions[session], count, number)),
            lambda got: self.model.allocate(session, count, number, got or []),
        )

    def share(self, session: int, refs: list[int]) -> Outcome:
        return self._both(
            lambda: self.core.share(self.sessions[session], packed(refs)),
            lambda _: self.model.share(session, refs),
        )

    def free(self, session: int, refs: list[int]) -> Outcome:
        self.now += 1
        return self._both(
            lambda: self.core.free(self.sessions[session], packed(refs), self.now),
            lambda _: self.model.give_back(session, refs),
        )

    def publish(
        self, session: int, name: str, tokens: bytes, refs: list[int], after: int | None
    ) -> Outcome:
        def core() -> list[int]:
            namespace = Namespace(model=name)
            done = self.core.publish(self.sessions[session], namespace, tokens, packed(refs), after)
            canonical = unpacked(done.refs)
            differ = sum(a != b for a, b in zip(canonical, refs, strict=True))
            assert done.num_duplicates == differ
            return canonical

        path = path_of(tokens)
        return self._both(core, lambda _: self.model.publish(session, name, path, refs, after))

    def end_session(self, session: int) -> None:
        self.core.end_session(self.sessions[session])
        self.model.end_session(session)
        self.agree()

    def release_session(self, session: int) -> None:
        self.core.release_session(self.sessions[session], self.now)
        self.model.release_session(session, eviction_order(self.core))
        self.agree()

    # --- agreement

    def _both(self, core: Callable[[], Any], model: Callable[[Any], Any]) -> Outcome:
        before, got = snapshot(self.core), None
        try:
            got = core()
            here: Outcome = ("ok", got)
        except KvdError as e:
            here = (e.code, e.details.get("missing"))
            refused = snapshot(self.core)
            if isinstance(e, NoPages):  # leaves its demand in the queue, and nothing else
                del before["queue"], refused["queue"]
            assert refused == before, f"{e.code} changed the cache"
        try:
            there: Outcome = ("ok", model(got))
        except KvdError as e:
            there = (e.code, e.details.get("missing"))
        assert here == there, f"core {here}, model {there}"
        self.agree()
        return here

    def agree(self) -> None:
        check_cache(self.core)
        core, model = self.core, self.model
        assert set(unpacked(core.free_list.check().tobytes())) == model.free
        assert cached_pages(core) == model.cached
        assert eviction_order(core) == model.lru
        for session in core.sessions.values():
            held = Counter(session.writing) + Counter(session.sealed)
            for node in session.nodes:
                held.update(dict.fromkeys(unpacked(node.refs), node.holders[session]))
            assert held == +model.holds[session.id], f"{session} holds otherwise"
        requests = [
            (r.number, r.session.id, r.running, r.demand, r.asked)
            for r in core.queue._requests.values()
        ]
        assert requests == [
            (r.number, r.session, r.running, r.demand, r.asked) for r in model.queue.requests
        ]


def matchable(tokens: bytes) -> Path:
    """The full pages before the last token."""
    if not tokens:
        raise BadRequest("")
    return tuple(p for p in path_of(tokens[:-TOKEN_BYTES]) if len(p) == PAGE_BYTES)


def cached_pages(core: CacheManager) -> dict[Key, int]:
    cached: dict[Key, int] = {}
    paths: dict[int, Path] = {}
    for node in core.tree.nodes():  # parents before children
        assert node.parent is not None
        start = paths.get(node.parent.id, ())
        path = paths[node.id] = start + path_of(node.tokens)
        for i, ref in enumerate(unpacked(node.refs)):
            cached[node.namespace.model, path[: len(start) + i + 1]] = ref
    return cached


def eviction_order(core: CacheManager) -> list[int]:
    """Page by page, from each leaf's end upwards."""
    return [ref for node in core.tree._unprotected for ref in reversed(unpacked(node.refs))]


def snapshot(core: CacheManager) -> dict[str, Any]:
    """All that an operation can change, as plain values."""
    tree, queue = core.tree, core.queue
    return {
        "tree": [
            (
                (n.id, n.namespace, n.tokens, n.refs, n.protected_children, n.last_use_s),
                [(session.id, count) for session, count in n.holders.items()],
                [child.id for child in n.children.values()],
            )
            for n in tree.nodes()
        ],
        "order": [n.id for n in tree._unprotected],
        "counts": (tree.num_pages, tree.num_evictable, tree._next_id, tree.num_namespaces),
        "places": tree._node_id_of.tobytes(),
        "free": (core.free_list._stack.tobytes(), core.free_list._current.tobytes()),
        "sessions": [
            (s.id, s.ended, dict(s.writing), dict(s.sealed), [n.id for n in s.nodes])
            for s in core.sessions.values()
        ],
        "queue": (
            queue._next,
            [(r.number, r.running, r.demand, r.asked) for r in queue._requests.values()],
            list(core.to_yield),
        ),
        "counters": str(core.counters),
    }
