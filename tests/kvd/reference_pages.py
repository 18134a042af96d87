"""What the tree of cached pages promises, said again page by page: one object a page, no edges.

Who is protected, what may go and in which order follows here from the holds of single pages. Three
choices are the core's and are taken over (`Choices`): which doomed pages go first, which pages that
wait for their children come back into the order together, and the order of what a dead session
drops at once.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Protocol

from kvd.options import CacheOptions, TenantShare
from kvd.retention import DEFAULT_PRIORITY, NO_WISH, Retention
from kvd_shared.namespace import Namespace
from kvd_shared.refs import GENERATION

Place = tuple[int | Namespace, bytes]  # behind which page or at whose start; a page's tokens
NEVER = math.inf
NONE: set[int] = set()


class Choices(Protocol):
    """What the core did where it may choose."""

    def is_in_tree(self, ref: int) -> bool: ...

    def in_one_node(self, ref: int, other: int) -> bool: ...


@dataclass(eq=False)
class Tenant:
    min_pages: int
    max_pages: int
    ttl_s: float | None
    num_pages: int = 0
    levels: dict[int, list[Page]] = field(default_factory=dict)  # by priority; first goes first

    @property
    def lowest(self) -> tuple[int, list[Page]] | None:
        return min(((p, level) for p, level in self.levels.items() if level), default=None)


@dataclass(eq=False)
class Page:
    """One page of the tree. `cover` counts the held pages at and below it."""

    ref: int
    namespace: Namespace
    tenant: Tenant
    parent: Page | None
    place: Place
    depth: int
    publisher: int
    retention: Retention
    priority: int
    children: dict[bytes, Page] = field(default_factory=dict)  # those in the tree behind it
    holders: Counter[int] = field(default_factory=Counter)
    cover: int = 0
    last_use_s: float = 0.0
    expires_s: float = NEVER
    until_s: float = NEVER  # when its priority decays
    gone_for: str = ""  # why it can be matched no longer
    parked: bool = False  # it was to go, and waits for its children to go first

    def matchable(self, now: float) -> bool:
        return not self.gone_for and (self.cover > 0 or self.expires_s > now)

    def below(self) -> list[Page]:
        return [self] + [p for child in self.children.values() for p in child.below()]


class PageTree:
    def __init__(self, num_pages: int, options: CacheOptions, choices: Choices) -> None:
        self.num_pages = num_pages
        self.choices = choices
        self.exact = options.policy == "lru"  # other policies choose within tenant and priority
        self.free = set(range(num_pages))  # references: generation << 32 | page
        self.pages: dict[int, Page] = {}
        self.roots: dict[Namespace, dict[bytes, Page]] = {}
        # What was last there: when it left, why, its last use. Several that left at once: all.
        self.left: dict[Place, list[tuple[float, str, float]]] = {}
        self.num_left: Counter[str] = Counter()
        self.now = 0.0
        nobody = TenantShare(salt=b"")
        self.others = Tenant(0, num_pages, options.ttl_s)
        self.by_salt = {
            t.salt: Tenant(
                int(t.min_share * num_pages + 1e-6),
                int(t.max_share * num_pages + 1e-6),
                options.ttl_s if t.ttl_s is nobody.ttl_s else t.ttl_s,
            )
            for t in options.tenants
        }

    @property
    def tenants(self) -> list[Tenant]:
        return [self.others, *self.by_salt.values()]

    @property
    def num_evictable(self) -> int:
        return sum(not page.cover for page in self.pages.values())

    @property
    def in_order(self) -> set[int]:
        return {p.ref for t in self.tenants for level in t.levels.values() for p in level}

    def walk(self, namespace: Namespace, keys: list[bytes], now: float) -> list[Page]:
        found: list[Page] = []
        children = self.roots.get(namespace, {})
        for key in keys:
            page = children.get(key)
            if page is None or not page.matchable(now):
                break
            found.append(page)
            children = page.children
        return found

    # --- holds

    def hold(self, session: int, page: Page, count: int = 1) -> None:
        newly = not page.holders
        page.holders[session] += count
        above: Page | None = page if newly else None
        while above is not None:
            above.cover += 1
            if above.cover == 1:
                self.out_of_order(above)
            above = above.parent

    def unhold(self, session: int, page: Page, now: float, count: int = 1) -> None:
        page.holders[session] -= count
        if not page.holders[session]:
            del page.holders[session]
        above: Page | None = None if page.holders else page
        while above is not None:
            above.cover -= 1
            if not above.cover:
                self.unprotected(above, now)
            above = above.parent

    def unprotected(self, page: Page, now: float) -> None:
        wish = page.retention
        ttl_s = page.tenant.ttl_s if wish.ttl_s is None else wish.ttl_s
        page.last_use_s, page.expires_s = now, NEVER if ttl_s is None else now + ttl_s
        if wish.duration_s is not None and page.until_s == NEVER:
            page.until_s = now + wish.duration_s
        if not page.gone_for:
            self.into_order(page)

    def into_order(self, page: Page) -> None:
        page.parked = False
        page.tenant.levels.setdefault(page.priority, []).append(page)

    def out_of_order(self, page: Page) -> None:
        page.parked = False
        level = page.tenant.levels.get(page.priority, [])
        if page in level:
            level.remove(page)

    # --- coming and going

    def insert(
        self, namespace: Namespace, parent: Page | None, key: bytes, ref: int, session: int,
        count: int, retention: Retention,
    ) -> Page:  # fmt: skip
        siblings = parent.children if parent else self.roots.setdefault(namespace, {})
        if old := siblings.get(key):
            self.expire(old)
            siblings = parent.children if parent else self.roots.setdefault(namespace, {})
        page = Page(
            ref, namespace, self.by_salt.get(namespace.salt, self.others), parent,
            (parent.ref if parent else namespace, key), parent.depth + 1 if parent else 0,
            session, retention, retention.priority,
        )  # fmt: skip
        page.tenant.num_pages += 1
        siblings[key] = self.pages[ref] = page
        self.hold(session, page, count)
        return page

    def evict(self, count: int, wanted: set[int]) -> None:
        """Doomed pages first, of which the core chose (`wanted`: pages that it used at once)."""
        for _ in range(count):
            doomed = self.doomed()
            gone = [p for p in doomed if not self.choices.is_in_tree(p.ref)]
            assert gone or not doomed, "a page was evicted that could be matched yet"
            gone.sort(key=lambda p: p.ref + GENERATION not in wanted)
            if gone:
                self.leave(gone[0], gone[0].gone_for)
            else:
                self.leave(self.victim(None, wanted), "evicted")

    def evict_over_share(self, tenant: Tenant) -> None:
        """Whether doomed pages or others go first is the core's choice."""
        doomed = [p for p in self.doomed() if p.tenant is tenant]
        gone = [p for p in doomed if not self.choices.is_in_tree(p.ref)]
        while tenant.num_pages > tenant.max_pages and (gone or tenant.lowest):
            self.leave(gone.pop() if gone else self.victim(tenant), "over_share")

    def victim(self, tenant: Tenant | None, wanted: set[int] = NONE) -> Page:
        if not self.exact:
            return self.any_victim(wanted)
        while True:
            of = tenant or min((t for t in self.tenants if t.lowest), key=standing)
            assert of.lowest is not None
            page = of.lowest[1][0]
            if not page.children:
                return page
            self.out_of_order(page)
            page.parked = True

    def any_victim(self, wanted: set[int]) -> Page:
        """One of the lowest priority with nothing behind it: the core chose which. Several may have
        gone in one operation: first those that were `wanted`, last those that uncover others."""
        ends = [p for p in self.pages.values() if not (p.cover or p.gone_for or p.children)]
        lowest = min(p.priority for p in ends)
        gone = [p for p in ends if p.priority == lowest and not self.choices.is_in_tree(p.ref)]
        assert gone, "a page went before one of lower priority, or before what stands behind it"
        above = {p: p.parent.priority if p.parent else lowest for p in gone}
        return min(gone, key=lambda p: (p.ref + GENERATION not in wanted, -above[p]))

    def leave(self, page: Page, reason: str) -> None:
        assert not page.cover and (page.gone_for or not page.children), f"{page.ref} was not to go"
        for child in page.children.values():
            child.parent = None  # they are doomed as well, and it does not matter who goes first
        self.out_of_order(page)
        del self.pages[page.ref]
        self.free.add(page.ref + GENERATION)
        page.tenant.num_pages -= 1
        before = [one for one in self.left.get(page.place, []) if one[0] == self.now]
        self.left[page.place] = [*before, (self.now, reason, page.last_use_s)]
        self.num_left[reason] += 1
        if page.parent is not None:
            page.parent.children.pop(page.place[1])
            self.last_child_left(page.parent)
        elif self.roots.get(page.namespace, {}).get(page.place[1]) is page:
            self.roots[page.namespace].pop(page.place[1])
            if not self.roots[page.namespace]:
                del self.roots[page.namespace]

    def last_child_left(self, parent: Page) -> None:
        above: Page | None = parent
        while above and above.parked and (above is not parent or not parent.children):
            if above is not parent and not self.choices.in_one_node(parent.ref, above.ref):
                break
            self.into_order(above)
            above = above.parent

    # --- doom

    def doomed(self) -> list[Page]:
        return [p for p in self.pages.values() if p.gone_for and not p.cover]

    def flush(self, namespace: Namespace, reason: str) -> None:
        for page in self.roots.pop(namespace, {}).values():
            self.doom(page, reason)

    def doom(self, page: Page, reason: str) -> None:
        for one in page.below():
            one.gone_for = one.gone_for or reason
            self.out_of_order(one)

    def expire(self, page: Page) -> None:
        """It and all behind it can be matched no longer, and its place can be another's."""
        assert not page.cover
        self.doom(page, "expired")
        if page.parent is not None:
            parent, page.parent = page.parent, None
            del parent.children[page.place[1]]
            self.last_child_left(parent)
        elif self.roots.get(page.namespace, {}).get(page.place[1]) is page:
            del self.roots[page.namespace][page.place[1]]
            if not self.roots[page.namespace]:
                del self.roots[page.namespace]

    def due(self, now: float) -> list[Page]:
        """What time has made unmatchable, or less worth keeping."""
        some = [p for p in self.pages.values() if not p.cover and not p.gone_for]
        return [p for p in some if min(p.expires_s, p.until_s) <= now]

    def decay(self, page: Page) -> None:
        moves = not page.parked and page.priority != DEFAULT_PRIORITY
        if moves:
            self.out_of_order(page)
        page.priority, page.until_s = DEFAULT_PRIORITY, NEVER
        page.retention = Retention(ttl_s=page.retention.ttl_s)
        if moves:
            self.into_order(page)

    def retain(self, page: Page, retention: Retention = NO_WISH) -> None:
        page.retention, page.priority, page.until_s = retention, retention.priority, NEVER


def standing(tenant: Tenant) -> tuple[int, int, float]:
    """Over its maximum: first. Within its minimum: last. Then by priority and last use."""
    assert tenant.lowest is not None
    over, within = tenant.num_pages > tenant.max_pages, tenant.num_pages <= tenant.min_pages
    priority, level = tenant.lowest
    return (0 if over else 2 if within else 1), priority, level[0].last_use_s
