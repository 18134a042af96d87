"""What operators keep cached whatever happens, within a share of the pool."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvd.options import pages_of
from kvd.session import Session
from kvd_shared.errors import BadRequest, OverQuota, UnknownHandle
from kvd_shared.namespace import Namespace
from kvd_shared.refs import REF_BYTES, TOKEN_BYTES

if TYPE_CHECKING:
    from kvd.cache import CacheManager

OPERATOR = 0  # id of the session that stands for them
MAX_RETAINS = 4096


@dataclass(frozen=True, slots=True)
class Retained:
    namespace: Namespace
    refs: bytes
    expires_s: float | None


class OperatorRetains:
    """Invariant: the operators' session holds exactly the pages of `retained`, each as often as it
    is named there; these are at most `quota` different pages."""

    def __init__(self, cache: CacheManager) -> None:
        self._cache = cache
        self.quota = pages_of(cache.options.operator_quota, cache.num_pages)
        self.retained: dict[int, Retained] = {}
        self._next = 1
        self._session: Session | None = None

    @property
    def num_pages(self) -> int:
        return self._session.num_held_pages if self._session else 0

    def retain(
        self, namespace: Namespace, tokens: bytes, duration_s: float | None, now: float
    ) -> tuple[int, int]:
        """Keep the cached whole pages of the tokens for `duration_s` (None: until released).
        Returns a number to release them by, and how many tokens they have. Raises OverQuota."""
        cache = self._cache
        if duration_s is not None and not 0 < duration_s < float("inf"):
            raise BadRequest(f"duration_s = {duration_s}: must be above 0 seconds, or nil")
        if len(self.retained) >= MAX_RETAINS:
            raise OverQuota(f"{MAX_RETAINS} prompts are retained already: release some first")
        pages = len(tokens) // TOKEN_BYTES // cache.page_size
        walk = cache.tree.walk(namespace, tokens, pages, now)
        if not walk.num_pages:
            raise BadRequest("nothing of these tokens is cached in that namespace")
        new = sum(s.stop - s.start for s in walk.spans if self._session not in s.node.holders)
        wanted = self.num_pages + new
        if wanted > self.quota:
            raise OverQuota(
                f"{wanted} pages would be retained; operator_quota allows {self.quota} of "
                f"{cache.num_pages}: release something, or raise the quota",
                wanted=wanted,
                most=self.quota,
            )
        session = self._session
        if session is None:
            session = self._session = cache.open_session(OPERATOR, "operator", now)
        refs = walk.refs
        for span in walk.spans:
            cache.tree.hold(span, session)
        number, self._next = self._next, self._next + 1
        until = None if duration_s is None else now + duration_s
        self.retained[number] = Retained(namespace, refs, until)
        return number, len(refs) // REF_BYTES * cache.page_size

    def release(self, number: int, now: float) -> None:
        if number not in self.retained:
            raise UnknownHandle(f"nothing is retained under number {number}")
        assert self._session is not None
        self._cache.free(self._session, self.retained.pop(number).refs, now)

    def tick(self, now: float) -> None:
        for number, one in list(self.retained.items()):
            if one.expires_s is not None and one.expires_s <= now:
                self.release(number, now)
