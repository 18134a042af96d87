"""What leaves the tree, when and why: eviction, flushes, expiry.

A *doomed* node's pages cannot be matched any more (flushed, of an older weights version, expired)
and go first: by `evict`, or in small portions by `sweep`.
"""

from __future__ import annotations

from typing import Protocol

from kvd.departures import Departures
from kvd.eviction import EvictionOrder, Tenant
from kvd.metadata import Metadata
from kvd.node import NEVER, Node, Root
from kvd.options import CacheOptions
from kvd.retention import DEFAULT_PRIORITY, Retention
from kvd.timers import Timers
from kvd.tree_reading import TreeReading
from kvd_shared.namespace import Namespace
from kvd_shared.refs import REF_BYTES


class Observer(Protocol):
    """Is told what can be matched, and what no longer; see kvd.events."""

    def stored(
        self, namespace: Namespace, parent: int | None, tokens: bytes, refs: bytes
    ) -> None: ...

    def removed(self, refs: bytes) -> None: ...


class TreeLeaving(TreeReading):
    """Invariants: TreeShape's; the nodes in the eviction order are the unprotected ones, except
    those that are doomed, or put aside until their children have gone; a live root has pages."""

    def __init__(
        self, num_pages: int, page_size: int, options: CacheOptions, meta: Metadata
    ) -> None:
        super().__init__(num_pages, page_size)
        self.meta = meta
        self.eviction = EvictionOrder(num_pages, options)
        self.departures = Departures()
        self.observer: Observer | None = None
        self.num_evictable = 0  # pages of unprotected nodes
        self.num_detached = 0  # held pages of flushed roots
        self._doomed: list[tuple[list[Node], str]] = []  # stack of what goes first, and why
        self._timers = Timers()

    # --- leaving

    def evict(self, num_pages: int, now: float) -> bytes:
        """Remove exactly `num_pages` of those that are to go first; returns their references.

        The caller has checked that as many are evictable.
        """
        gone: list[bytes | bytearray] = []
        eviction = self.eviction
        while num_pages > 0:
            doomed = self._next_doomed() if self._doomed else None
            if doomed is not None:
                node, reason = doomed
                take = len(node.refs) >> 3
            else:
                node, reason = eviction.victim(), "evicted"
                assert node.order is not None
                take = node.order.portion(node) if eviction.alone else eviction.allowance(node)
            if take > num_pages:
                take = num_pages
            gone.append(self._trim(node, take, reason, now))
            num_pages -= take
        return self._gone(gone)

    def evict_over_share(self, tenant: Tenant, now: float) -> bytes:
        """Bring a tenant down to its maximum, as far as its pages are evictable."""
        gone: list[bytes | bytearray] = []
        while (over := tenant.num_pages - tenant.max_pages) > 0 and tenant.first is not None:
            node = self.eviction.victim(tenant)
            gone.append(self._trim(node, min(over, node.num_pages), "over_share", now))
        return self._gone(gone)

    def _gone(self, pieces: list[bytes | bytearray]) -> bytes:
        """Pages that have left their nodes leave the table of places too."""
        gone = b"".join(pieces)
        if gone:
            self._set_slots(gone, 0)
            if self.observer is not None:
                self.observer.removed(gone)
        return gone

    def _trim(self, leaf: Node, num_pages: int, reason: str, now: float) -> bytes | bytearray:
        """Take the last pages off an unprotected leaf; returns their references, for `_gone`."""
        refs, parent, order = leaf.refs, leaf.parent, leaf.order
        assert parent is not None
        keep, step = (len(refs) >> 3) - num_pages, self.page_token_bytes
        self.num_evictable -= num_pages
        self.num_pages -= num_pages
        leaf.root.tenant.num_pages -= num_pages
        if keep:
            above = refs[(keep - 1) * REF_BYTES : keep * REF_BYTES]
            key = bytes(leaf.tokens[keep * step : (keep + 1) * step])
            gone = refs[keep * REF_BYTES :]
            del refs[keep * REF_BYTES :], leaf.tokens[keep * step :]
        else:
            above, key, gone = parent.refs[-REF_BYTES:], leaf.key, refs
            if order is not None:
                order.discard(leaf)
                leaf.order = None
            self._disown(parent, key)
            self._forget(leaf)
            if not parent.children:
                self._ends(parent)
        place = (int.from_bytes(above, "little") if above else leaf.root.namespace, key)
        self.departures.note(place, reason, num_pages, leaf.born_s, leaf.last_use_s, now)
        if order is not None:
            order.evicted(leaf, num_pages)
        return gone

    def _forget(self, node: Node) -> None:
        if node.timer_s != NEVER:
            self._timers.discard(node)
        super()._forget(node)

    # --- doom

    def flush(self, root: Root, reason: str) -> None:
        """Nothing of this root can be matched from now on. Its pages leave by and by."""
        self.meta.roots.dead(root.id)
        del self.roots[root.namespace]
        root.live, root.left = False, reason
        self.num_detached += root.num_held
        self._doomed.append((list(root.top.children.values()), reason))

    def sweep(self, max_nodes: int, now: float) -> bytes:
        """Take up to that many doomed nodes out; returns the references of their pages."""
        gone: list[bytes | bytearray] = []
        for _ in range(max_nodes):
            doomed = self._next_doomed()
            if doomed is None:
                break
            node, reason = doomed
            gone.append(self._trim(node, node.num_pages, reason, now))
        return self._gone(gone)

    @property
    def has_doomed(self) -> bool:
        return bool(self._doomed)

    def _next_doomed(self) -> tuple[Node, str] | None:
        """A doomed leaf that can go now. It stays on the stack until it is gone."""
        while self._doomed:
            group, reason = self._doomed[-1]
            if not group:
                self._doomed.pop()
                continue
            node = group[-1]
            if not node.id:
                group.pop()
                continue
            if self.observer is not None:
                self.observer.removed(bytes(node.refs))
            if node.protected:  # it comes back when its last hold ends; not so what is below it
                group.pop()
            elif not node.children:
                return node, reason
            if node.children:
                self._doomed.append((list(node.children.values()), reason))
        return None

    def _doom(self, node: Node, reason: str) -> None:
        """What `flush` is to a root, for an unprotected node and all below it."""
        parent = node.parent
        assert parent is not None and not node.protected
        self.meta.pages.doomed(int.from_bytes(node.refs[:REF_BYTES], "little"))
        self._disown(parent, node.key)
        grave = Root(node.namespace, node.root.tenant)
        grave.live, grave.left = False, reason
        grave.top.refs += parent.refs[-REF_BYTES:]  # where it was, for the memory of departures
        self._adopt(grave.top, node)
        self._doomed.append(([node], reason))
        if not parent.children:
            self._ends(parent)

    def _ends(self, parent: Node) -> None:
        """It has no children any more."""
        if parent.parent is None:
            if self.roots.get(parent.namespace) is parent.root:
                self.meta.roots.dead(parent.root.id)
                del self.roots[parent.namespace]
        elif parent.order is None and not parent.protected and parent.root.live:
            self.eviction.add(parent)  # it had been put aside for its children

    # --- time

    def has_expired(self, now: float) -> bool:
        return self._timers.is_due(now)

    def expire(self, now: float, max_nodes: int) -> None:
        """Drop what has expired and let outlived priorities decay, so many nodes at most."""
        for _ in range(max_nodes):
            if not self.has_expired(now):
                return
            node = self._timers.pop()
            if node.protected or not node.root.live:
                continue
            if node.expires_s <= now:
                self._doom(node, "expired")
                continue
            if node.priority_until_s <= now:
                self._decay(node)
            self._timers.set(node, min(node.expires_s, node.priority_until_s))

    def _decay(self, node: Node) -> None:
        moves = node.order is not None and node.priority != DEFAULT_PRIORITY
        if moves:
            self.eviction.discard(node)
        node.retention = Retention(ttl_s=node.retention.ttl_s)
        node.priority, node.priority_until_s = DEFAULT_PRIORITY, NEVER
        if moves:
            self.eviction.add(node)

    def _start_timers(self, node: Node, now: float) -> None:
        wish = node.retention
        ttl_s = node.root.tenant.ttl_s if wish.ttl_s is None else wish.ttl_s
        node.expires_s = NEVER if ttl_s is None else now + ttl_s
        if wish.duration_s is not None and node.priority_until_s == NEVER:
            node.priority_until_s = now + wish.duration_s
        self._timers.set(node, min(node.expires_s, node.priority_until_s))
