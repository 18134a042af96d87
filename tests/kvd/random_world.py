"""A pool with random options, who works on it, and what can be chosen from there."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from kvd.options import CacheOptions, Limits, TenantShare
from kvd.retention import NO_WISH, Retention
from kvd_shared.namespace import Namespace
from kvd_shared.refs import TOKEN_BYTES
from tests.kvd.paired_cache import PairedCache

PAGE_SIZE = 4
PAGE_BYTES = PAGE_SIZE * TOKEN_BYTES


@dataclass(eq=False)
class Row:
    """One sequence of a worker: its prompt, its pages in order, and how far they are published."""

    session: int
    namespace: Namespace
    number: int | None
    tokens: bytes
    pages: list[int] = field(default_factory=list)
    published: int = 0


class RandomWorld:
    def __init__(self, seed: int, check_every: int = 1, strict: bool = True) -> None:
        self.rng = random.Random(seed)
        num_pages = self.rng.choice([8, 12, 16, 24])
        options = random_options(self.rng, num_pages)
        self.pair = PairedCache(num_pages, 3, PAGE_SIZE, options, check_every, strict)
        self.rows: list[Row] = []
        self.handles: list[tuple[int, int, int | None]] = []  # session, handle, number
        self.partial: list[tuple[int, int]] = []  # session, page
        self.tickets: list[bytes] = []
        self.retained: list[int] = []
        self.next_session = 4
        for _ in range(self.rng.randint(0, 4)):
            self.fill()

    # --- choosing

    def session(self) -> int:
        live = [number for number, one in self.pair.sessions.items() if not one.ended]
        return self.rng.choice(live if live and self.rng.random() < 0.9 else [*self.pair.sessions])

    def session_with(self, numbers: list[int]) -> int:
        there = [number for number in numbers if number in self.pair.sessions]
        return self.rng.choice(there) if there else self.session()

    def namespace(self) -> Namespace:
        tenants = [b"", b"s", b"t"] if len(self.pair.model.tree.tenants) > 1 else [b""]
        return Namespace(
            model=self.rng.choice("mmmmmmn"),
            weights_version=self.rng.choice([2, 2, 2, 2, 2, 3]),
            salt=self.rng.choice(tenants),
        )

    def wanted(self) -> tuple[Namespace, bytes]:
        """A prompt, of which something is often cached already."""
        pages = list(self.pair.model.tree.pages.values())
        if not pages or self.rng.random() < 0.3:
            return self.namespace(), self.prompt()
        page, tokens = self.rng.choice(pages), b""
        namespace = page.namespace
        while page is not None:
            tokens, page = page.place[1] + tokens, page.parent  # type: ignore[assignment]
        cut = self.rng.choice([len(tokens), len(tokens) - self.rng.randint(1, 3) * TOKEN_BYTES])
        return namespace, tokens[:cut] + self.rng.choice([b"", self.prompt(), self.prompt()])

    def prompt(self) -> bytes:
        """Up to six pages of few different tokens, cut anywhere."""
        pages = self.rng.choices([b"\1\0\0\0", b"\2\0\0\0"], [3, 1], k=self.rng.randint(1, 6))
        tokens = bytearray(b"".join(page * PAGE_SIZE for page in pages))
        if self.rng.random() < 0.4:
            tokens[self.rng.randrange(len(tokens) // TOKEN_BYTES) * TOKEN_BYTES] = 3
        if self.rng.random() < 0.5:
            del tokens[self.rng.randint(1, len(tokens) // TOKEN_BYTES) * TOKEN_BYTES :]
        return bytes(tokens)

    def row(self) -> Row | None:
        return self.rng.choice(self.rows) if self.rows else None

    def least(self) -> int | None:
        return self.rng.choice([None, 1, 1, 2, 3])

    def wish(self) -> Retention:
        if self.rng.random() < 0.6:
            return NO_WISH
        return Retention(
            priority=self.rng.choice([0, 35, 35, 80, 100]),
            duration_s=self.rng.choice([None, 1.0, 4.0]),
            ttl_s=self.rng.choice([None, 2.0, 8.0]),
        )

    def held(self, session: int) -> list[int]:
        return sorted(self.pair.model.sessions[session].held)

    def number_of(self, session: int) -> int | None:
        mine = [r.number for r in self.pair.model.queue.requests if r.session == session]
        return self.rng.choice([None, *mine])

    def some(self, refs: list[int]) -> list[int]:
        return self.rng.sample(refs, self.rng.randint(1, len(refs))) if refs else []

    def fill(self) -> None:
        """Something is cached."""
        session, namespace, tokens = self.session(), self.namespace(), self.prompt()
        pages = len(tokens) // PAGE_BYTES
        answer, refs = self.pair.allocate(session, pages, None) if pages else ("", [])
        if answer == "ok":
            self.pair.publish(session, namespace, tokens[: pages * PAGE_BYTES], refs, None)
            self.pair.free(session, refs)


def random_options(rng: random.Random, num_pages: int) -> CacheOptions:
    tenants: tuple[TenantShare, ...] = ()
    policy = rng.choice(["lru"] * 6 + ["density", "cost"])
    if rng.random() < 0.4 and policy == "lru":
        tenants = (
            TenantShare(salt=b"s", min_share=rng.choice([0.0, 0.25]), max_share=0.5),
            TenantShare(salt=b"t", min_share=0.125, ttl_s=rng.choice([None, 3.0])),
        )
    limits = Limits(
        max_prompt_tokens=rng.choice([1 << 20, 1 << 20, 1 << 20, 20]),
        max_pages_a_session=rng.choice([None, None, num_pages // 2]),
        max_requests_a_session=rng.choice([65536, 3]),
    )
    ttl_s = rng.choice([None, None, 5.0])
    return CacheOptions(
        policy=policy, ttl_s=ttl_s, tenants=tenants, limits=limits, operator_quota=0.25
    )
