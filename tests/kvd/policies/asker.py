"""One worker that computes prompts, each a path of pages by number."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kvd.cache import CacheManager
from kvd.options import CacheOptions
from kvd.policies import Policy
from kvd_shared.namespace import Namespace
from kvd_shared.refs import REF_BYTES
from tests.kvd.tokens import PAGE_BYTES, PAGE_SIZE

NAMESPACE = Namespace(model="m")
ONE_MORE = bytes(4)  # the last token is never matched


class Asker:
    """A second passes with each prompt. Prompts in `open_prompts` are still being computed."""

    def __init__(self, policy: str, num_pages: int) -> None:
        self.cache = CacheManager(num_pages, PAGE_SIZE, CacheOptions(policy=policy))
        self.session = self.cache.open_session(1, "asker", 0.0)
        self.now = 0.0
        self.open_prompts: list[bytes] = []

    @property
    def policy(self) -> Policy:
        """The one order that there is, without tenants and priorities."""
        (policy,) = self.cache.tree.eviction.tenants[0].levels.values()
        return policy

    def ask(self, pages: Sequence[int]) -> int:
        """Compute a prompt and let go of it; returns how many of its pages were cached."""
        found = self.begin(pages)
        self.finish(-1)
        return found

    def begin(self, pages: Sequence[int]) -> int:
        self.now += 1
        tokens = np.repeat(np.array(pages, dtype="<i4"), PAGE_SIZE).tobytes()
        held = self.cache.acquire(
            self.session, NAMESPACE, tokens + ONE_MORE, len(pages), None, self.now
        )
        known, refs = held.num_matched_pages, held.refs
        if known < len(pages):
            last = refs[(known - 1) * REF_BYTES : known * REF_BYTES]
            after = int.from_bytes(last, "little") if known else None
            rest = tokens[known * PAGE_BYTES :]
            new = refs[known * REF_BYTES :]
            self.cache.publish(self.session, NAMESPACE, rest, new, after, self.now)
        self.open_prompts.append(refs)
        return known

    def finish(self, number: int) -> None:
        self.cache.free(self.session, self.open_prompts.pop(number), self.now)

    def cached(self, pages: Sequence[int]) -> int:
        """How many of the prompt's pages are cached. Changes nothing."""
        tokens = np.repeat(np.array(pages, dtype="<i4"), PAGE_SIZE).tobytes() + ONE_MORE
        found = self.cache.probe(self.session, NAMESPACE, tokens, self.now)
        return found // PAGE_SIZE
