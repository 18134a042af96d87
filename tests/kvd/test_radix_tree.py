"""The tree's shape, told in letters: a letter is one page of tokens, a line one node.

`drawn` shows each node as its letters and how often each session holds them, children indented and
in order: ["ab 1", "  c 0", "  d 0 2"] are the pages a and b, held once by the first session, and
behind them c, held by nobody, and d, held twice by the second one.
"""

from __future__ import annotations

import random

import pytest

from kvd.cache import NO_OPTIONS
from kvd.node import Node
from kvd.options import CacheOptions
from kvd.radix_tree import RadixTree
from kvd.retention import NO_WISH
from kvd.session import Session
from kvd.tree_check import check_tree
from kvd.tree_reading import Span, Walk
from kvd_shared.namespace import Namespace
from kvd_shared.refs import TOKEN_BYTES, page_of
from tests.kvd.tokens import PAGE_BYTES, PAGE_SIZE, packed, page_tokens, unpacked

MAIN = Namespace(model="m")


class Garden:
    """A tree and two sessions; pages are numbered as they are published."""

    def __init__(self, num_pages: int = 100, options: CacheOptions = NO_OPTIONS) -> None:
        self.tree = RadixTree(num_pages, PAGE_SIZE, options)
        self.one, self.two = Session(1, "one", 0.0), Session(2, "two", 0.0)
        self.now = 0.0
        self.free = list(range(num_pages))

    def publish(
        self, tokens: bytes, session: Session, count: int = 1, where: Namespace = MAIN
    ) -> list[int]:
        """Hold what is there and insert the rest, as the cache's publish does."""
        known = self.tree.walk(where, tokens, len(tokens) // PAGE_BYTES, self.now)
        refs = unpacked(known.refs)
        for span in known.spans:
            self.tree.hold(span, session)
        missing = len(tokens) // PAGE_BYTES - len(refs)
        new, self.free = self.free[:missing], self.free[missing:]
        if new:
            rest = tokens[len(refs) * PAGE_BYTES :]
            after = refs[-1] if refs else None
            self.tree.insert(where, after, rest, packed(new), session, count, NO_WISH, self.now)
        check_tree(self.tree)
        return refs + new

    def hold(self, refs: list[int], session: Session) -> None:
        for _, span in self.tree.pieces(packed(refs)):
            assert span is not None
            self.tree.hold(span, session)
        check_tree(self.tree)

    def release(self, refs: list[int], session: Session) -> None:
        self.now += 1
        for _, span in self.tree.pieces(packed(refs)):
            assert span is not None
            self.tree.release(span, session, self.now)
        check_tree(self.tree)

    def evict(self, count: int) -> list[int]:
        gone = unpacked(self.tree.evict(count, self.now))
        check_tree(self.tree)
        self.free += gone
        return gone

    def drawn(self) -> list[str]:
        lines: list[str] = []

        def draw(node: Node, depth: int) -> None:
            letters = "".join(chr(t) for t in node.tokens[::PAGE_BYTES])
            holds = [node.holders.get(s, 0) for s in (self.one, self.two)]
            shown = " ".join(map(str, holds if holds[1] else holds[:1]))
            lines.append(f"{'  ' * depth}{letters} {shown}")
            for child in sorted(node.children.values(), key=lambda n: n.tokens):
                draw(child, depth + 1)

        for root in self.tree.roots.values():
            for child in sorted(root.top.children.values(), key=lambda n: n.tokens):
                draw(child, 0)
        return lines


def walk_after(tree: RadixTree, ref: int, tokens: bytes, limit: int, now: float) -> Walk:
    """The walk that goes on behind a page."""
    node = tree.node_of(ref)
    assert node is not None
    return tree.walk_from(node, tree.depth_of(page_of(ref)) + 1, tokens, limit, now)


def abc(letters: str) -> bytes:
    return page_tokens(letters)


# --- shape


def test_two_prompts_that_share_their_beginning_branch_where_they_differ() -> None:
    garden = Garden()
    first = garden.publish(abc("abcd"), garden.one)
    second = garden.publish(abc("abxy"), garden.two)
    assert garden.drawn() == ["ab 1 1", "  cd 1", "  xy 0 1"]
    assert second[:2] == first[:2] and not set(second[2:]) & set(first)


def test_a_prompt_that_is_the_beginning_of_another_cuts_it_without_a_branch() -> None:
    garden = Garden()
    garden.publish(abc("abcd"), garden.one)
    garden.publish(abc("ab"), garden.two)
    assert garden.drawn() == ["ab 1 1", "  cd 1"]


def test_publishing_page_by_page_makes_one_node_not_a_chain() -> None:
    garden = Garden()
    pages = garden.publish(abc("a"), garden.one)
    for i, letter in enumerate("bcd"):
        garden.tree.insert(
            MAIN, pages[-1], abc(letter), packed([50 + i]), garden.one, 1, NO_WISH, 0.0
        )
        pages.append(50 + i)
        check_tree(garden.tree)
    assert garden.drawn() == ["abcd 1"]
    assert unpacked(garden.tree.walk(MAIN, abc("abcd"), 4, 0.0).refs) == pages


@pytest.mark.parametrize(
    ("count", "also_held", "expected"),
    [
        (1, False, ["abc 1"]),
        (2, False, ["ab 1", "  c 2"]),  # a fork's pages: each of its sequences holds c
        (1, True, ["ab 1 1", "  c 1"]),  # the other session did not ask for c
    ],
)
def test_a_node_grows_in_place_only_where_all_its_pages_stay_held_alike(
    count: int, also_held: bool, expected: list[str]
) -> None:
    garden = Garden()
    pages = garden.publish(abc("ab"), garden.one)
    if also_held:
        garden.hold(pages, garden.two)
    garden.tree.insert(MAIN, pages[-1], abc("c"), packed([50]), garden.one, count, NO_WISH, 0.0)
    check_tree(garden.tree)
    assert garden.drawn() == expected


def test_nothing_grows_in_place_from_the_middle_of_a_node() -> None:
    garden = Garden()
    pages = garden.publish(abc("abc"), garden.one)
    garden.tree.insert(MAIN, pages[0], abc("x"), packed([50]), garden.one, 1, NO_WISH, 0.0)
    check_tree(garden.tree)
    assert garden.drawn() == ["a 1", "  bc 1", "  x 1"]


# --- matching


def test_one_differing_token_ends_the_match_before_its_page() -> None:
    garden = Garden()
    garden.publish(abc("abcd"), garden.one)
    for page in range(4):
        for token in (0, PAGE_SIZE - 1):
            at = page * PAGE_BYTES + token * TOKEN_BYTES
            asked = abc("abcd")[:at] + b"\xff\0\0\0" + abc("abcd")[at + TOKEN_BYTES :]
            assert garden.tree.walk(MAIN, asked, 4, 0.0).num_pages == page


def test_a_walk_stops_at_its_limit_within_a_node_and_between_two() -> None:
    garden = Garden()
    first = garden.publish(abc("abcd"), garden.one)
    second = garden.publish(abc("abxy"), garden.one)
    for limit in range(5):
        assert unpacked(garden.tree.walk(MAIN, abc("abcd"), limit, 0.0).refs) == first[:limit]
        assert unpacked(garden.tree.walk(MAIN, abc("abxy"), limit, 0.0).refs) == second[:limit]
    assert unpacked(walk_after(garden.tree, first[0], abc("bxyz"), 4, 0.0).refs) == second[1:]
    assert unpacked(walk_after(garden.tree, first[1], abc("cd"), 1, 0.0).refs) == first[2:3]


def test_a_walk_from_the_middle_of_a_node_does_not_jump_to_its_children() -> None:
    """ "abc" goes on with "x", and "a" does not."""
    garden = Garden()
    first = garden.publish(abc("abcx"), garden.one)
    garden.publish(abc("abcy"), garden.one)
    assert garden.drawn() == ["abc 2", "  x 1", "  y 1"]
    assert walk_after(garden.tree, first[0], abc("x"), 1, 0.0).num_pages == 0
    assert unpacked(walk_after(garden.tree, first[0], abc("bcx"), 3, 0.0).refs) == first[1:]


def test_namespaces_are_apart_and_vanish_with_their_last_page() -> None:
    garden = Garden()
    other = Namespace(model="m", salt=b"tenant")
    mine = garden.publish(abc("ab"), garden.one)
    theirs = garden.publish(abc("ab"), garden.two, where=other)
    assert not set(mine) & set(theirs)
    assert unpacked(garden.tree.walk(other, abc("abc"), 3, 0.0).refs) == theirs
    assert (
        garden.tree.walk(Namespace(model="m", weights_version=1), abc("ab"), 2, 0.0).num_pages == 0
    )
    garden.release(mine, garden.one)
    assert garden.evict(2) == mine
    assert garden.tree.num_namespaces == 1 and garden.drawn() == ["ab 0 1"]


def test_a_reference_of_an_earlier_use_names_no_node() -> None:
    garden = Garden()
    (page,) = garden.publish(abc("a"), garden.one)
    assert garden.tree.node_of(page) is not None
    for foreign in (page + (1 << 32), page - (1 << 32), page + 1, 100, -1, 1 << 31):
        assert garden.tree.node_of(foreign) is None


def test_two_neighbours_whose_bytes_look_like_a_third_page_are_not_taken_for_it() -> None:
    """Page 0 at generation 5 is the bytes (0, 5), which also stand between the references (7, 0)
    and (5, 0)."""
    tree, session = RadixTree(10, PAGE_SIZE, NO_OPTIONS), Session(1, "one", 0.0)
    refs = [7, 5, 5 << 32, 1]
    tree.insert(MAIN, None, abc("abcd"), packed(refs), session, 1, NO_WISH, 0.0)
    found = walk_after(tree, refs[2], abc("d"), 1, 0.0)
    assert unpacked(found.refs) == [1]
    assert [unpacked(span.refs) for _, span in tree.pieces(packed(refs[2:])) if span] == [refs[2:]]


# --- holds


def test_holding_a_part_cuts_the_node_and_the_rest_stays_evictable() -> None:
    garden = Garden()
    pages = garden.publish(abc("abcd"), garden.one)
    garden.release(pages, garden.one)
    garden.hold(pages[:2], garden.two)
    assert garden.drawn() == ["ab 0 1", "  cd 0"]
    assert garden.tree.num_evictable == 2
    assert garden.evict(2) == pages[2:]


def test_letting_go_of_the_middle_frees_nothing_while_later_pages_are_held() -> None:
    garden = Garden()
    pages = garden.publish(abc("abcd"), garden.one)
    garden.release(pages[1:3], garden.one)
    assert garden.drawn() == ["a 1", "  bc 0", "    d 1"]
    assert garden.tree.num_evictable == 0
    garden.release(pages[3:], garden.one)
    assert garden.tree.num_evictable == 3
    assert garden.evict(3) == pages[1:]  # b, c and d were released and are one node again
    assert garden.drawn() == ["a 1"]


def test_holds_are_counted_and_each_is_released_by_itself() -> None:
    garden = Garden()
    pages = garden.publish(abc("ab"), garden.one)
    garden.hold(pages, garden.one)
    garden.hold(pages[:1], garden.two)
    assert garden.drawn() == ["a 2 1", "  b 2"]
    garden.release(pages, garden.one)
    assert garden.drawn() == ["a 1 1", "  b 1"]
    garden.release(pages, garden.one)
    assert garden.drawn() == ["a 0 1", "  b 0"]
    assert set(garden.one.nodes) == set() and len(garden.two.nodes) == 1


# --- eviction


def test_the_least_recently_used_leaf_goes_first_and_only_as_much_of_it_as_is_needed() -> None:
    garden = Garden()
    old = garden.publish(abc("abc"), garden.one)
    new = garden.publish(abc("xyz"), garden.one)
    garden.release(old, garden.one)
    garden.release(new, garden.one)
    assert garden.evict(1) == old[2:]
    assert garden.drawn() == ["ab 0", "xyz 0"]
    assert garden.evict(3) == [*old[:2], new[2]]
    assert garden.drawn() == ["xy 0"]
    assert garden.tree.num_pages == garden.tree.num_evictable == 2


def test_a_prefix_in_use_elsewhere_outlives_its_branches() -> None:
    """Two chats share a system prompt. The older chat goes first, then the newer one, and the
    prompt itself last."""
    garden = Garden()
    older = garden.publish(abc("sab"), garden.one)
    newer = garden.publish(abc("sxy"), garden.one)
    garden.release(older, garden.one)
    garden.release(newer, garden.one)
    assert garden.drawn() == ["s 0", "  ab 0", "  xy 0"]
    assert garden.evict(2) == older[1:]
    assert garden.evict(3) == [*newer[1:], newer[0]]
    assert garden.tree.num_pages == 0


def test_use_renews_a_whole_prefix_but_not_what_hangs_below_it() -> None:
    garden = Garden()
    first = garden.publish(abc("abc"), garden.one)
    second = garden.publish(abc("xyz"), garden.one)
    garden.release(first, garden.one)
    garden.release(second, garden.one)
    garden.hold(first[:2], garden.two)
    garden.release(first[:2], garden.two)
    assert garden.evict(4) == [first[2], *second]
    assert garden.drawn() == ["ab 0"]


def test_a_trimmed_leaf_grows_again_with_other_pages() -> None:
    garden = Garden()
    pages = garden.publish(abc("abc"), garden.one)
    garden.release(pages, garden.one)
    garden.evict(2)
    again = garden.publish(abc("axc"), garden.one)
    assert again[0] == pages[0]
    assert unpacked(garden.tree.walk(MAIN, abc("abc"), 3, 0.0).refs) == pages[:1]


# --- against brute force


class BruteForce:
    """Every page with all tokens up to its end, in a list; each search looks at all of them."""

    def __init__(self) -> None:
        self.pages: list[tuple[Namespace, bytes, int]] = []

    def longest_prefix(self, where: Namespace, tokens: bytes, limit: int) -> list[int]:
        usable = tokens[: limit * PAGE_BYTES]
        fits = [p for p in self.pages if p[0] == where and usable.startswith(p[1])]
        return [ref for _, _, ref in sorted(fits, key=lambda p: len(p[1]))]

    def partial(self, where: Namespace, tokens: bytes, matched: int) -> dict[int, int]:
        """How many tokens each page that continues the prefix has in common with the rest."""
        start = matched * PAGE_BYTES
        found = {}
        for name, upto, ref in self.pages:
            if name == where and len(upto) == start + PAGE_BYTES and upto[:start] == tokens[:start]:
                pairs = zip(upto[start:], tokens[start:], strict=False)
                same = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
                most = min(PAGE_BYTES, len(tokens) - start)
                found[ref] = (most if same is None else same) // TOKEN_BYTES
        return found


@pytest.mark.parametrize("seed", range(10))
def test_the_tree_finds_what_brute_force_finds(seed: int) -> None:
    """Whole pages, and the page that continues them best; pages are evicted, flushed and expire
    (all of them after five seconds without a hold, which `release` counts)."""
    for i in range(100):
        rng = random.Random(seed * 100 + i)
        ttl_s = rng.choice([None, 5.0])
        garden, brute = Garden(32, CacheOptions(ttl_s=ttl_s)), BruteForce()
        held = list[tuple[Session, list[int]]]()
        for _ in range(30):
            where = Namespace(model=rng.choice("mn"))
            tokens = random_tokens(rng)
            limit = rng.randint(0, len(tokens) // PAGE_BYTES)
            found = garden.tree.walk(where, tokens, limit, garden.now)
            assert unpacked(found.refs) == brute.longest_prefix(where, tokens, limit)
            assert found.num_pages == len(unpacked(found.refs))
            check_partial(garden, brute, where, tokens)

            whole = tokens[: len(tokens) // PAGE_BYTES * PAGE_BYTES]
            if len(garden.free) >= 8 and whole:
                session = rng.choice([garden.one, garden.two])
                pages = garden.publish(whole, session, where=where)
                held.append((session, pages))
                known = {ref for _, _, ref in brute.pages}
                brute.pages += [
                    (where, whole[: (n + 1) * PAGE_BYTES], ref)
                    for n, ref in enumerate(pages)
                    if ref not in known
                ]
            elif held:
                session, pages = held.pop(rng.randrange(len(held)))
                garden.release(pages, session)
            evictable = garden.tree.num_evictable
            if evictable and rng.random() < 0.3:
                gone = garden.evict(rng.randint(1, evictable))
                brute.pages = [p for p in brute.pages if p[2] not in gone]
            if rng.random() < 0.05 and where in garden.tree.roots:
                garden.tree.flush(garden.tree.roots[where], "flushed")
                brute.pages = [p for p in brute.pages if p[0] != where]
            if rng.random() < 0.1:
                garden.now += 3.0
            if ttl_s is not None:
                brute.pages = [p for p in brute.pages if not expired(garden, p[2])]


def check_partial(garden: Garden, brute: BruteForce, where: Namespace, tokens: bytes) -> None:
    num_tokens = len(tokens) // TOKEN_BYTES
    walk = garden.tree.walk(where, tokens, (num_tokens - 1) // PAGE_SIZE, garden.now)
    got = garden.tree.partial(walk, tokens, num_tokens - 1, garden.now)
    best = brute.partial(where, tokens[:-TOKEN_BYTES], walk.num_pages)
    if got is None:
        assert max(best.values(), default=0) == 0
    else:
        (ref,) = unpacked(Span(got[0], got[1], got[1] + 1).refs)
        assert got[1] == walk.num_pages and best[ref] == got[2] == max(best.values())


def expired(garden: Garden, ref: int) -> bool:
    """A page without a hold at or behind it, or one that stands behind such a page."""
    node = garden.tree.node_of(ref)
    while node is not None and node.parent is not None:
        if not node.protected and node.expires_s <= garden.now:
            return True
        node = node.parent
    return False


def random_tokens(rng: random.Random) -> bytes:
    """Up to 8 pages, of two tokens that mostly repeat, so that prefixes are long and branch."""
    pages = [rng.choice([b"\1\0\0\0", b"\1\0\0\0", b"\2\0\0\0"]) * PAGE_SIZE for _ in range(8)]
    tokens = bytearray(b"".join(pages)[: rng.randint(1, 8 * PAGE_SIZE) * TOKEN_BYTES])
    if rng.random() < 0.5:
        tokens[rng.randrange(len(tokens) // TOKEN_BYTES) * TOKEN_BYTES] = 3
    return bytes(tokens)


def test_a_span_is_a_piece_of_one_node() -> None:
    garden = Garden()
    first = garden.publish(abc("abcd"), garden.one)
    second = garden.publish(abc("abxy"), garden.one)
    mixed = [first[1], first[2], 77, second[3], first[0], first[1]]
    pieces = [
        unpacked(span.refs) if isinstance(span, Span) else ref
        for ref, span in garden.tree.pieces(packed(mixed))
    ]
    assert pieces == [[first[1]], [first[2]], 77, [second[3]], first[:2]]
