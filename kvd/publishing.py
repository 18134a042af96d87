"""How pages enter the tree, and what keeps them out of it."""

from __future__ import annotations

from array import array
from itertools import groupby, repeat

from kvd.holdings import Holdings, ref_at
from kvd.metadata import Metadata
from kvd.node import Node, Root
from kvd.options import CacheOptions
from kvd.results import Counters, Published
from kvd.retention import NO_WISH, Retention
from kvd.session import Session
from kvd.versions import Versions
from kvd_shared.errors import BadRequest, Detached
from kvd_shared.namespace import Namespace
from kvd_shared.refs import REF_BYTES, TOKEN_BYTES, page_of, refs_from_bytes


class Publishing(Holdings):
    """Invariants: Holdings's; no live root belongs to a stale weights version."""

    def __init__(
        self, num_pages: int, page_size: int, options: CacheOptions, meta: Metadata | None
    ) -> None:
        super().__init__(num_pages, page_size, options, meta)
        self.versions = Versions(self.meta.weights)
        self.counters = Counters()

    def publish(
        self,
        session: Session,
        namespace: Namespace,
        tokens: bytes,
        refs: bytes,
        after: int | None,
        now: float,
        retention: Retention = NO_WISH,
    ) -> Published:
        """Seal full pages and put them into the tree, behind the page `after` (None: from the
        prompt's start). `after` is in the tree and held by the session; the pages are its own, or
        those that the tree has there already.

        Raises StaleVersion or Detached where the pages' KV is not wanted any more: they stay the
        session's own.
        """
        self.live(session)
        count = len(refs) // REF_BYTES
        if not count or len(tokens) != count * self.page_size * TOKEN_BYTES:
            raise BadRequest(
                f"publish of {len(tokens) // TOKEN_BYTES} tokens in {count} pages: "
                f"every page has {self.page_size} tokens, and there must be at least one"
            )
        if after is None:
            self.versions.check(namespace)
            walk = self.tree.walk(namespace, tokens, count, now)
        else:
            node = self._check_after(session, namespace, after)
            start = self.tree.depth_of(page_of(after)) + 1
            walk = self.tree.walk_from(node, start, tokens, count, now)
        known_refs, known = walk.refs, walk.num_pages  # read before a hold cuts the spans' nodes
        mine = array("q", refs).tolist()
        differ = self._differing(mine, refs, known_refs, known)
        self._check_kept(session, mine, refs, known, differ)
        holds = self._take_written(session, mine[known:]) if not differ else None
        if holds is None:
            self._check_own(session, mine, known, differ)
        for first, last in _runs(differ) if differ else ():
            piece = known_refs[first * REF_BYTES : last * REF_BYTES]
            for _, span in self.tree.pieces(piece):
                assert span is not None
                self.tree.hold(span, session)
        for i in differ:
            if mine[i] in session.writing:
                self.seal(session, mine[i], self.page_size)
        if known < count:
            end = ref_at(known_refs, known - 1) if known else after
            if holds is None:
                holds = self._take_own(session, mine[known:])
            self._insert(session, namespace, end, tokens, refs, mine, holds, retention, now)
            if not self.tree.eviction.alone:
                self._keep_share(namespace, now)
        self.counters.published_pages += count - known
        self.counters.duplicate_pages += len(differ)
        canonical = known_refs + refs[known * REF_BYTES :] if differ else refs
        return Published(canonical, count - known, len(differ))

    def retain(self, session: Session, refs: bytes, retention: Retention) -> None:
        """Let a wish hold for pages of the tree, all of which the session holds."""
        self.live(session)
        self.check_held(session, refs)
        for ref, span in self.tree.pieces(refs):
            if span is None:
                raise BadRequest(f"page {page_of(ref)} is not in the tree: publish it first")
        for _, span in self.tree.pieces(refs):
            assert span is not None
            self.tree.retain(span, retention)

    # --- what must not come back

    def flush(self, roots: list[Root], reason: str = "flushed") -> None:
        """Make the KV of these namespaces unmatchable. O(1) each: it leaves by `sweep`."""
        for root in roots:
            if root.live:
                self.tree.flush(root, reason)

    # --- how

    def _check_after(self, session: Session, namespace: Namespace, after: int) -> Node:
        node = self.tree.node_of(after)
        if node is None or session not in node.holders:
            if after in session.sealed and not self.sealed[after][0]:
                raise Detached(f"page {page_of(after)} left the tree in a restart of the daemon")
            if session.own(after) is not None:
                raise BadRequest(f"page {page_of(after)} is not in the tree: publish it as well")
            raise self.not_held(session, after)
        if node.root.namespace != namespace:
            raise BadRequest(f"page {page_of(after)} belongs to another namespace")
        self.versions.check(namespace)  # its root may be about to be flushed
        if not node.root.live:
            raise Detached(
                f"page {page_of(after)} was flushed: what comes behind it cannot be matched; "
                "compute on, and publish no more of this sequence"
            )
        return node

    def _differing(self, mine: list[int], refs: bytes, known_refs: bytes, known: int) -> list[int]:
        """Which of the first `known` pages are not those that the tree has there."""
        if not known or refs.startswith(known_refs):
            return []
        theirs = refs_from_bytes(known_refs).tolist()
        return [i for i in range(known) if mine[i] != theirs[i]]

    def _check_kept(
        self, session: Session, mine: list[int], refs: bytes, known: int, differ: list[int]
    ) -> None:
        """The session must hold what the tree has already and it names itself."""
        if differ:
            skip = set(differ)
            same = [mine[i] for i in range(known) if i not in skip]
            self.check_held(session, b"".join([r.to_bytes(REF_BYTES, "little") for r in same]))
        elif known:
            self.check_held(session, refs[: known * REF_BYTES])

    def _take_written(self, session: Session, own: list[int]) -> list[int] | None:
        """Take pages out of those that the session is writing, and tell how often it holds each.
        None, having changed nothing, unless it is writing all of them and none is named twice."""
        writing = session.writing
        holds = list(map(writing.pop, own, repeat(0)))
        if 0 not in holds:
            return holds
        for ref, count in zip(own, holds, strict=True):
            if count:
                writing[ref] = count
        return None

    def _take_own(self, session: Session, own: list[int]) -> list[int]:
        """The same for pages that the session is writing or has sealed, as was checked."""
        holds = []
        for ref in own:
            if ref in session.writing:
                holds.append(session.writing.pop(ref))
            else:
                holds.append(session.sealed.pop(ref))
                del self.sealed[ref]
        return holds

    def _check_own(self, session: Session, mine: list[int], known: int, differ: list[int]) -> None:
        """Every page that the tree has not, or has another of, must be the session's to publish."""
        own = [mine[i] for i in differ] + mine[known:]
        if len(set(own)) != len(own):
            raise BadRequest("a page is named twice in one publish")
        for ref in own:
            if ref in session.writing or ref in session.sealed:
                continue
            if ref in session.leased:
                raise BadRequest(f"page {page_of(ref)} is leased: say that it is in use first")
            if self.tree.node_of(ref) is not None:
                raise BadRequest(
                    f"page {page_of(ref)} is sealed in the tree already, for other tokens"
                )
            raise self.not_held(session, ref)
        for ref in mine[known:]:
            if ref in session.sealed and self.sealed[ref] != (self.page_size, session.sealed[ref]):
                raise BadRequest(
                    f"page {page_of(ref)} is a sealed tail, or another session holds it as well: "
                    "copy it into a page of your own"
                )

    def _insert(
        self,
        session: Session,
        namespace: Namespace,
        after: int | None,
        tokens: bytes,
        refs: bytes,
        mine: list[int],
        holds: list[int],
        retention: Retention,
        now: float,
    ) -> None:
        """Put the last pages into the tree, as often held as `holds` says, in runs that are held
        equally often."""
        step = self.page_size * TOKEN_BYTES
        start = len(mine) - len(holds)
        alike = holds.count(holds[0]) == len(holds)
        for count, length in [(holds[0], len(holds))] if alike else _lengths(holds):
            stop = start + length
            self.tree.insert(
                namespace,
                after,
                tokens[start * step : stop * step],
                refs[start * REF_BYTES : stop * REF_BYTES],
                session,
                count,
                retention,
                now,
            )
            after, start = mine[stop - 1], stop

    def _keep_share(self, namespace: Namespace, now: float) -> None:
        tenant = self.tree.eviction.tenant_of(namespace)
        if tenant.num_pages > tenant.max_pages:
            self.free_list.put(self.tree.evict_over_share(tenant, now))


def _lengths(values: list[int]) -> list[tuple[int, int]]:
    """Each value with how often it comes in a row."""
    return [(value, len(list(run))) for value, run in groupby(values)]


def _runs(indices: list[int]) -> list[tuple[int, int]]:
    """Sorted indices as half-open runs."""
    runs: list[tuple[int, int]] = []
    for i in indices:
        if runs and runs[-1][1] == i:
            runs[-1] = (runs[-1][0], i + 1)
        else:
            runs.append((i, i + 1))
    return runs
