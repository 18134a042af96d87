"""Whether the cache core and its reference model are in the same state."""

from __future__ import annotations

from collections import Counter

from kvd.cache import CacheManager
from kvd.cache_check import check_cache
from kvd.node import NEVER
from kvd.session import Session
from kvd_shared.namespace import Namespace
from tests.kvd.reference_model import ReferenceModel
from tests.kvd.reference_pages import Page
from tests.kvd.reference_parts import ReferenceOperator, ReferenceSequences, ReferenceTickets
from tests.kvd.tokens import unpacked

COUNTED = (
    "tokens_asked",
    "tokens_matched",
    "tokens_matched_own",
    "tokens_partial",
    "published_pages",
    "duplicate_pages",
    "copied_pages",
    "allocated_pages",
)


class CoreView:
    """What the core did where it may choose (`reference_pages.Choices`)."""

    def __init__(self, core: CacheManager) -> None:
        self.core = core

    def is_in_tree(self, ref: int) -> bool:
        return self.core.tree.node_of(ref) is not None

    def in_one_node(self, ref: int, other: int) -> bool:
        node = self.core.tree.node_of(ref)
        return node is not None and node is self.core.tree.node_of(other)

    def is_matchable(self, ref: int) -> bool:
        node = self.core.tree.node_of(ref)
        while node is not None and node.parent is not None:
            node = node.parent
        root = self.core.tree.roots.get(node.namespace) if node is not None else None
        return root is not None and root.top is node

    def has_decayed(self, ref: int) -> bool:
        node = self.core.tree.node_of(ref)
        assert node is not None
        return node.priority_until_s == NEVER

    def held(self, session: Session) -> Counter[int]:
        held = Counter(session.writing) + Counter(session.leased) + Counter(session.sealed)
        for node in session.nodes:
            held.update(dict.fromkeys(unpacked(node.refs), node.holders[session]))
        return held

    def order(self) -> list[dict[int, list[int]]]:
        """By tenant and priority, page by page, from each node's end upwards."""
        return [
            {
                priority: [r for node in policy for r in reversed(unpacked(node.refs))]
                for priority, policy in tenant.levels.items()
                if policy
            }
            for tenant in self.core.tree.eviction.tenants
        ]


class Told:
    """An observer: what it has been told can be matched."""

    def __init__(self) -> None:
        self.pages: dict[int, tuple[Namespace, int | None]] = {}

    def stored(self, namespace: Namespace, parent: int | None, tokens: bytes, refs: bytes) -> None:
        assert len(refs) > 0 and len(tokens) % (len(refs) // 8) == 0
        for ref in unpacked(refs):
            assert parent is None or parent in self.pages, "behind a page that nobody was told of"
            assert ref not in self.pages
            self.pages[ref] = namespace, parent
            parent = ref

    def removed(self, refs: bytes) -> None:
        for ref in unpacked(refs):
            self.pages.pop(ref, None)


def agree_order(view: CoreView, model: ReferenceModel, just_added: set[int]) -> None:
    """The order in which pages go; that of those `just_added` is the core's."""
    pages = model.tree.pages
    for tenant, core_levels in zip(model.tree.tenants, view.order(), strict=True):
        mine = {p: level for p, level in tenant.levels.items() if level}
        for priority in core_levels.keys() | mine.keys():
            core = core_levels.get(priority, [])
            live = [ref for ref in core if not pages[ref].gone_for]
            there = [p.ref for p in mine.get(priority, [])]
            fixed = [ref for ref in there if ref not in just_added]
            if not model.tree.exact:  # those that wait for their children stand nowhere
                ends = {ref for ref in there if not pages[ref].children}
                assert ends <= set(live) <= set(there)
                continue
            assert live[: len(fixed)] == fixed, f"priority {priority}: {live} goes, not {there}"
            assert sorted(live) == sorted(there), f"priority {priority}: {live} goes, not {there}"
            tenant.levels[priority] = [pages[ref] for ref in live]


def agree(
    core: CacheManager,
    model: ReferenceModel,
    sequences: ReferenceSequences,
    tickets: ReferenceTickets,
    operator: ReferenceOperator,
    told: Told,
) -> None:
    """Raises AssertionError at the first difference."""
    check_cache(core)
    tree = model.tree
    assert set(unpacked(core.free_list.check().tobytes())) == tree.free
    assert core.tree.num_evictable == tree.num_evictable
    assert core.num_available == len(tree.free) + tree.num_evictable
    assert core.tree.num_namespaces == len(tree.roots)
    assert [t.num_pages for t in core.tree.eviction.tenants] == [t.num_pages for t in tree.tenants]
    agree_pages(core, tree.pages)
    matchable = {ref for ref, page in tree.pages.items() if not page.gone_for}
    assert matchable <= told.pages.keys() <= tree.pages.keys()
    for ref in matchable:
        page = tree.pages[ref]
        assert told.pages[ref] == (page.namespace, page.parent.ref if page.parent else None)
    for number, session in core.sessions.items():
        mine = model.sessions[number]
        assert session.ended == mine.ended
        assert (session.writing, session.leased, session.sealed) == (
            dict(mine.writing),
            dict(mine.leased),
            dict(mine.sealed),
        ), f"{session} holds otherwise"
        cached = Counter[int]()
        for node in session.nodes:
            cached.update(dict.fromkeys(unpacked(node.refs), node.holders[session]))
        assert cached == mine.cached
    assert core.sessions.keys() == model.sessions.keys()
    assert {ref: tokens for ref, (tokens, _) in core.sealed.items()} == model.tails
    agree_requests(core, model)
    agree_parts(core, sequences, tickets, operator)
    assert {name: getattr(core.counters, name) for name in COUNTED} == {
        name: model.counted[name] for name in COUNTED
    }
    agree_departures(core, model)


def agree_pages(core: CacheManager, pages: dict[int, Page]) -> None:
    seen = 0
    for node in core.tree.nodes():
        step = core.tree.page_token_bytes
        above = node.parent.last_ref if node.parent else None
        behind: int | Namespace = node.namespace if above is None else above
        holders = {session.id: count for session, count in node.holders.items()}
        for i, ref in enumerate(unpacked(node.refs)):
            page = pages[ref]
            assert page.place == (behind, bytes(node.tokens[i * step : (i + 1) * step]))
            assert page.namespace == node.namespace and page.depth == node.depth + i
            assert page.holders == holders and node.protected == (page.cover > 0), f"page {ref}"
            assert page.publisher == node.publisher
            if not page.gone_for:  # else its wishes mean nothing any more
                assert (page.retention, page.priority) == (node.retention, node.priority)
                assert page.until_s == node.priority_until_s
                assert page.cover or page.expires_s == node.expires_s, f"page {ref}"
            assert page.cover or page.last_use_s == node.last_use_s
            behind, seen = ref, seen + 1
    assert seen == len(pages)


def agree_requests(core: CacheManager, model: ReferenceModel) -> None:
    requests = [
        (r.number, r.session.id, r.running, r.demand, r.asked, r.overdue)
        for r in core.queue._requests.values()
    ]
    assert requests == [
        (r.number, r.session, r.running, r.demand, r.asked, r.overdue) for r in model.queue.requests
    ]
    announced = {
        a.request.number: (
            (a.namespace, a.tokens, a.num_pages, a.first_page, a.done_pages),
            (a.began_s, a.progress_s, a.interval_s),
            {number: waiter.num_pages for number, waiter in a.waiters.items()},
        )
        for a in core.announcements
    }
    assert announced == {
        number: (
            (a.namespace, a.tokens, a.num_pages, a.first_page, a.done_pages),
            (a.began_s, a.progress_s, a.interval_s),
            a.waiters,
        )
        for number, a in model.waits.announced.items()
    }
    for announcement in model.waits.announced.values():
        assert announcement.request.running
        for number in announcement.waiters:  # so no cycle of waiters can be
            waiting = next(r for r in model.queue.requests if r.number == number)
            assert not waiting.running and number not in model.waits.announced


def agree_parts(
    core: CacheManager,
    sequences: ReferenceSequences,
    tickets: ReferenceTickets,
    operator: ReferenceOperator,
) -> None:
    live = [s for s in core.sessions.values() if not s.ended]
    here = {
        handle: (
            (s.namespace, s.number, s.ahead, s.num_tokens, s.num_computed, s.num_published),
            (bytes(s.tail), s.refs.tolist(), s.spare.tolist(), s.used, s.publishes),
        )
        for session in live
        for handle, s in session.sequences.items()
    }
    step = core.tree.page_token_bytes
    there = {
        handle: (
            (s.namespace, s.number, s.ahead, s.num_tokens, s.computed, s.published),
            (s.tokens[s.published * step :], s.refs, s.spare, s.used, s.publishes),
        )
        for handle, s in sequences.open_ones.items()
        if not s.session.ended
    }
    assert here == there
    assert {
        name: (unpacked(t.refs), t.expires_s, t.keeper.id)
        for name, t in core.handover._tickets.items()
    } == {name: (refs, until, k.number) for name, (refs, until, k) in tickets.tickets.items()}
    assert {
        number: (unpacked(one.refs), one.expires_s)
        for number, one in core.operator.retained.items()
    } == operator.retained
    assert core.operator.num_pages <= core.operator.quota


def agree_departures(core: CacheManager, model: ReferenceModel) -> None:
    """What left, and why: exact for every place that a prompt can still come to."""
    departures = core.tree.departures
    assert {why: pages for why, pages in departures.pages.items() if pages} == model.tree.num_left
    assert sum(departures.lifetime.counts) == sum(departures.idle.counts)
    assert sum(departures.idle.counts) == model.tree.num_left.total()
    for place, left in model.tree.left.items():
        behind = place[0]
        if isinstance(behind, int) and behind not in model.tree.pages:
            continue
        found = departures.at(place)
        assert found is not None, f"nothing is known of what was at {place}"
        assert (found.when_s, found.reason, found.last_use_s) in left
