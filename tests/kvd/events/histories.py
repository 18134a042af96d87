"""Random lives of a real cache core that is watched by an event log."""

from __future__ import annotations

import random
from contextlib import suppress

import numpy as np

from kvd.cache import CacheManager
from kvd.events.log import EventLog
from kvd.node import Node
from kvd.options import CacheOptions
from kvd.session import Session
from kvd_shared.errors import KvdError, NoPages
from kvd_shared.namespace import Namespace
from kvd_shared.refs import REF_BYTES, TOKEN_BYTES
from tests.kvd.events.follower import expected_hashes

PAGE_SIZE = 4
PAGE_BYTES = PAGE_SIZE * TOKEN_BYTES
NUM_PAGES = 40
SESSIONS = 2


class History:
    """One thing after another happens to the cache, each small; what it tells goes to `log`.

    Few letters and a small pool: prompts share prefixes, come again after they were flushed or
    evicted, and the same pages are used again.
    """

    def __init__(self, seed: int, buffer_steps: int = 10_000) -> None:
        self.dice = random.Random(seed)
        ttl_s = self.dice.choice([None, 20.0])
        self.cache = CacheManager(NUM_PAGES, PAGE_SIZE, CacheOptions(ttl_s=ttl_s))
        self.log = EventLog(
            NUM_PAGES,
            PAGE_SIZE,
            epoch=self.dice.randbytes(16),
            first_seq=1000,
            buffer_steps=buffer_steps,
        )
        self.cache.tree.observer = self.log
        self.now = 0.0
        self.version = 0
        self.num_sessions = 0
        self.held: list[tuple[int, bytes]] = []  # session's place, references
        self.sessions = [self._open() for _ in range(SESSIONS)]

    def _open(self) -> Session:
        self.num_sessions += 1
        return self.cache.open_session(self.num_sessions, "worker", self.now)

    def step(self) -> None:
        self.now += self.dice.random()
        kinds = {
            self.request: 12, self.free: 9, self.sweep: 3,
            self.flush: 1, self.raise_version: 0.3, self.die: 0.5,
        }  # fmt: skip
        with suppress(KvdError):  # what a worker may be told at any time; it changes nothing
            self.dice.choices(list(kinds), list(kinds.values()))[0]()

    def namespace(self) -> Namespace:
        return Namespace(
            model="m",
            weights_version=self.version,
            salt=self.dice.choice([b"", b"tenant"]),
            adapter=self.dice.choice([b"", b"", b"lora"]),
        )

    def request(self) -> None:
        """A prompt is looked up, computed and published, in one or two pieces."""
        place, namespace = self.dice.randrange(SESSIONS), self.namespace()
        session, length = self.sessions[place], self.dice.randrange(1, 9)
        letters = [self.dice.choice("aab") for _ in range(length)]
        prompt = np.repeat(np.frombuffer("".join(letters).encode(), np.uint8), PAGE_SIZE)
        tokens = prompt.astype("<i4").tobytes()
        try:
            found = self.cache.acquire(
                session, namespace, tokens + bytes(TOKEN_BYTES), length, None, self.now
            )
        except NoPages:
            return self.free()
        refs, after = found.refs, None
        self.held.append((place, refs))
        cut = self.dice.randrange(length + 1)
        for first, last in ((0, cut), (cut, length)):
            if first < last:
                piece = refs[first * REF_BYTES : last * REF_BYTES]
                text = tokens[first * PAGE_BYTES : last * PAGE_BYTES]
                done = self.cache.publish(session, namespace, text, piece, after, self.now)
                self.held[-1] = (place, self.held[-1][1].replace(piece, done.refs))
                if done.num_duplicates:
                    self._give_back_duplicates(place, piece, done.refs)
                after = int.from_bytes(done.refs[-REF_BYTES:], "little")
        return None

    def _give_back_duplicates(self, place: int, own: bytes, canonical: bytes) -> None:
        mine, theirs = np.frombuffer(own, "<i8"), np.frombuffer(canonical, "<i8")
        self.cache.free(self.sessions[place], mine[mine != theirs].tobytes(), self.now)

    def free(self) -> None:
        if self.held:
            place, refs = self.held.pop(self.dice.randrange(len(self.held)))
            self.cache.free(self.sessions[place], refs, self.now)

    def flush(self) -> None:
        roots = list(self.cache.tree.roots.values())
        self.cache.flush(self.dice.sample(roots, self.dice.randint(0, len(roots))))

    def raise_version(self) -> None:
        self.version += 1
        self.cache.raise_weights_version(None, self.version)
        self.cache.flush(list(self.cache.tree.roots.values()), "stale_version")

    def die(self) -> None:
        place = self.dice.randrange(SESSIONS)
        self.cache.release_session(self.sessions[place])
        self.held = [(other, refs) for other, refs in self.held if other != place]
        self.sessions[place] = self._open()

    def sweep(self) -> None:
        self.cache.sweep(self.now)

    def settle(self) -> None:
        """Nothing that was put off is left: what can be matched is all there is to tell of."""
        while self.cache.sweep(self.now):
            pass

    def matchable(self) -> set[int]:
        """The hashes of all pages that a match can find, read off the tree."""
        found: set[int] = set()

        def visit(node: Node, pages: list[bytes]) -> None:
            text = bytes(node.tokens)
            own = [text[i : i + PAGE_BYTES] for i in range(0, len(text), PAGE_BYTES)]
            found.update(expected_hashes(node.namespace, pages + own))
            for child in list(node.children.values()):
                visit(child, pages + own)

        for root in self.cache.tree.roots.values():
            visit(root.top, [])
        return found
