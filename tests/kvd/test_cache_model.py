"""The cache core does what its reference model does, whatever it is asked."""

from __future__ import annotations

import random

import pytest

from kvd.free_list import FreeList
from kvd_shared.errors import BadRequest
from kvd_shared.namespace import Namespace
from kvd_shared.refs import GENERATION, TOKEN_BYTES
from tests.kvd.paired_cache import PAGE_BYTES, PairedCache, packed, page_tokens, snapshot, unpacked

SEQUENCES_A_SEED = 100
OPERATIONS = 60


class Worker:
    """One sequence of a random worker: its prompt, its pages in order, and how far they are
    published."""

    def __init__(self, session: int, name: str, number: int | None, tokens: bytes) -> None:
        self.session, self.name, self.number, self.tokens = session, name, number, tokens
        self.pages: list[int] = []
        self.published = 0


class RandomWorkers:
    """Random operations, mostly legal: sequences of a few sessions that branch off each other."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.pair = PairedCache(rng.choice([12, 14, 16, 20, 32, 64]))
        self.sequences: list[Worker] = []
        self.names = ["m", "n"]

    def step(self) -> None:
        moves = [self.start] * 8 + [self.grow] * 4 + [self.publish] * 12 + [self.free] * 6
        moves += [self.match, self.share_and_free, self.free_some, self.yield_, self.illegal]
        if self.rng.random() < 0.02:
            moves = [self.end_session]
        self.rng.choice(moves)()

    def prompt(self) -> bytes:
        """A few pages of few letters; the last page may be cut, or differ in one token."""
        tokens = page_tokens("".join(self.rng.choices("ab", [3, 1], k=self.rng.randint(1, 8))))
        if self.rng.random() < 0.2:
            at = self.rng.randrange(len(tokens) // TOKEN_BYTES) * TOKEN_BYTES
            tokens = tokens[:at] + b"x\0\0\0" + tokens[at + TOKEN_BYTES :]
        if self.rng.random() < 0.5:
            tokens = tokens[: self.rng.randint(1, len(tokens) // TOKEN_BYTES) * TOKEN_BYTES]
        return tokens

    def any_session(self) -> int:
        return self.rng.choice(list(self.pair.sessions))

    def any_sequence(self) -> Worker | None:
        return self.rng.choice(self.sequences) if self.sequences else None

    # --- what workers do

    def start(self) -> None:
        session, name, tokens = self.any_session(), self.rng.choice(self.names), self.prompt()
        number = None
        if self.rng.random() < 0.7:
            number = self.pair.begin(session, 1)[1]
        sequence = Worker(session, name, number, tokens)
        self.sequences.append(sequence)
        self.acquire(sequence)

    def acquire(self, sequence: Worker) -> None:
        """As many pages as the prompt has, and one for what comes."""
        session, name, tokens = sequence.session, sequence.name, sequence.tokens
        count = self.rng.choice([1] + [len(tokens) // PAGE_BYTES + 1] * 4)
        before = self.pair.core.counters.tokens_matched
        answer, pages = self.pair.acquire(session, name, tokens, count, sequence.number)
        if answer == "ok":
            matched = self.pair.core.counters.tokens_matched - before
            sequence.pages = pages
            sequence.published = matched * TOKEN_BYTES // PAGE_BYTES

    def grow(self) -> None:
        sequence = self.any_sequence()
        if sequence and not sequence.pages:
            self.acquire(sequence)
        elif sequence:
            count = self.rng.randint(1, 3)
            answer, pages = self.pair.allocate(sequence.session, count, sequence.number)
            if answer == "ok":
                sequence.pages += pages
                sequence.tokens += self.prompt()

    def publish(self) -> None:
        sequence = self.any_sequence()
        if not sequence:
            return
        full = min(len(sequence.tokens) // PAGE_BYTES, len(sequence.pages))
        start = self.rng.choice([0, sequence.published])
        if start >= full:
            return
        stop = self.rng.choice([full, self.rng.randint(start + 1, full)])
        sent = sequence.pages[start:stop]
        after = sequence.pages[start - 1] if start else None
        tokens = sequence.tokens[start * PAGE_BYTES : stop * PAGE_BYTES]
        answer, canonical = self.pair.publish(sequence.session, sequence.name, tokens, sent, after)
        if answer != "ok":  # its pages are no longer those of its tokens: see free_some
            return
        sequence.published = max(stop, sequence.published)
        sequence.pages[start:stop] = canonical
        duplicates = [ref for ref in sent if ref not in canonical]
        if duplicates:
            self.free_all(sequence.session, duplicates)

    def free_all(self, session: int, refs: list[int]) -> None:
        if self.rng.random() < 0.2:
            self.rng.shuffle(refs)
        assert self.pair.free(session, refs)[0] == "ok"

    def free(self) -> None:
        """The sequence ends."""
        sequence = self.any_sequence()
        if sequence:
            self.sequences.remove(sequence)
            if sequence.pages:
                self.free_all(sequence.session, sequence.pages)
            if sequence.number is not None:
                self.pair.end(sequence.session, sequence.number)

    def free_some(self) -> None:
        """It lets go of a piece from the middle, as if nobody needed it: later pages stay."""
        sequence = self.any_sequence()
        if sequence and len(sequence.pages) > 2:
            start = self.rng.randrange(len(sequence.pages))
            stop = self.rng.randint(start + 1, len(sequence.pages))
            piece = sequence.pages[start:stop]
            rest = Worker(sequence.session, sequence.name, None, b"")
            rest.pages = sequence.pages[:start] + sequence.pages[stop:]
            self.sequences.append(rest)
            sequence.pages, sequence.published = [], 0
            self.free_all(sequence.session, piece)

    def yield_(self) -> None:
        sequence = self.any_sequence()
        if sequence and sequence.number is not None:
            if sequence.pages:
                self.free_all(sequence.session, sequence.pages)
            sequence.pages, sequence.published = [], 0
            self.pair.yielded(sequence.session, sequence.number)

    def match(self) -> None:
        """Holds that no request number stands for, as a tool that pins a prompt has."""
        sequence = Worker(self.any_session(), self.rng.choice(self.names), None, self.prompt())
        sequence.pages = self.pair.match(sequence.session, sequence.name, sequence.tokens)[1]
        sequence.published = len(sequence.pages)
        self.sequences.append(sequence)

    def share_and_free(self) -> None:
        """A fork: a second sequence with a part of the first one's pages."""
        sequence = self.any_sequence()
        if sequence and sequence.pages:
            count = self.rng.randint(1, len(sequence.pages))
            fork = Worker(sequence.session, sequence.name, None, sequence.tokens)
            fork.pages = sequence.pages[:count]
            fork.published = min(sequence.published, count)
            assert self.pair.share(sequence.session, fork.pages)[0] == "ok"
            self.sequences.append(fork)

    def end_session(self) -> None:
        """Its requests are refused at once; its pages come back when its process is gone."""
        session = self.any_session()
        self.pair.end_session(session)
        assert self.pair.allocate(session, 1, None)[0] == "SESSION_ENDED"
        self.pair.release_session(session)
        self.sequences = [s for s in self.sequences if s.session != session]
        del self.pair.sessions[session]
        self.pair.open(len(self.pair.model.ended) + 3)

    # --- what they must not do

    def illegal(self) -> None:
        """Each is refused with its own error; PairedCache sees that nothing has changed."""
        pair, session = self.pair, self.any_session()
        others = [s for s in self.sequences if s.session != session and s.pages]
        held = pair.model.holds[session]
        foreign = [r for s in others for r in s.pages if not held[r]]
        mine = [ref for ref in held if held[ref]]
        free = self.rng.choice([*pair.model.free, -1, 1 << 31])
        stale = self.rng.choice(mine) - GENERATION if mine else -5
        for ref in [free, stale, *foreign[:1]]:
            some = [*mine[:2], ref]
            assert pair.free(session, some)[0] == "NOT_HELD"
            assert pair.share(session, some)[0] == "NOT_HELD"
            assert pair.publish(session, "o", page_tokens("z"), [ref], None)[0] in {
                "NOT_HELD",
                "BAD_REQUEST",
            }
            if ref < 0:
                continue
            if mine and mine[0] not in pair.model.cached.values():
                refused = pair.publish(session, "m", page_tokens("z"), mine[:1], ref)
                assert refused[0] == "NOT_HELD"
        if mine:
            assert pair.free(session, [mine[0], mine[0]])[0] == "BAD_REQUEST"
            refused = pair.publish(session, "o", page_tokens("zz"), [mine[0]] * 2, None)
            assert refused[0] == "BAD_REQUEST"
        for count in (0, -1, pair.core.num_pages + 1):
            assert pair.allocate(session, count, None)[0] == "BAD_REQUEST"
            assert pair.acquire(session, "m", page_tokens("a"), count, None)[0] == "BAD_REQUEST"
        assert pair.begin(session, self.rng.choice([0, -1, 4097]))[0] == "BAD_REQUEST"
        unknown = self.rng.choice(
            [0, pair.model.queue.next_number, *self.numbers_of_others(session)]
        )
        assert pair.allocate(session, 1, unknown)[0] == "UNKNOWN_REQUEST"
        assert pair.acquire(session, "m", page_tokens("a"), 1, unknown)[0] == "UNKNOWN_REQUEST"
        assert pair.end(session, unknown)[0] == "UNKNOWN_REQUEST"
        assert pair.yielded(session, unknown)[0] == "UNKNOWN_REQUEST"

    def numbers_of_others(self, session: int) -> list[int]:
        return [r.number for r in self.pair.model.queue.requests if r.session != session]


# --- stories


def test_the_last_token_of_a_prompt_is_never_matched() -> None:
    """Of a cached prompt of three whole pages, two match: its last token's logits are wanted."""
    pair = PairedCache(8)
    _, pages = pair.allocate(1, 3, None)
    pair.publish(1, "m", page_tokens("abc"), pages, None)
    assert pair.match(2, "m", page_tokens("abc")) == ("ok", pages[:2])
    assert pair.match(2, "m", page_tokens("abc") + b"\0" * TOKEN_BYTES) == ("ok", pages)
    assert pair.match(2, "m", page_tokens("abc")[:-TOKEN_BYTES]) == ("ok", pages[:2])
    assert pair.match(2, "m", page_tokens("a")[: 2 * TOKEN_BYTES]) == ("ok", [])


def test_who_publishes_the_beginning_of_a_cached_prompt_gets_the_cached_pages() -> None:
    pair = PairedCache(8)
    _, cached = pair.allocate(1, 4, None)
    pair.publish(1, "m", page_tokens("abcd"), cached, None)
    _, mine = pair.allocate(2, 3, None)
    assert pair.publish(2, "m", page_tokens("abx"), mine, None) == ("ok", [*cached[:2], mine[2]])
    assert pair.free(2, mine[:2]) == ("ok", None)
    assert pair.free(2, mine[:2])[0] == "NOT_HELD"
    assert pair.match(3, "m", page_tokens("abx.")) == ("ok", [*cached[:2], mine[2]])


def test_two_forks_publish_what_they_share_and_each_keeps_its_hold() -> None:
    pair = PairedCache(8)
    _, pages = pair.allocate(1, 2, None)
    pair.share(1, pages)
    pair.publish(1, "m", page_tokens("ab"), pages, None)
    pair.publish(1, "m", page_tokens("ab"), pages, None)
    pair.free(1, pages)
    assert pair.core.num_available == 6
    pair.free(1, pages)
    assert pair.core.num_available == 8
    assert pair.free(1, pages)[0] == "NOT_HELD"


def test_forks_that_were_too_late_swap_one_by_one() -> None:
    """The shared page is a duplicate. Each fork's publish gives it a hold on the cached page, and
    the duplicate is free when both have let go of it."""
    pair = PairedCache(4)
    _, cached = pair.allocate(1, 1, None)
    pair.publish(1, "m", page_tokens("a"), cached, None)
    _, shared = pair.allocate(2, 1, None)
    pair.share(2, shared)
    for available in (2, 3):
        assert pair.publish(2, "m", page_tokens("a"), shared, None) == ("ok", cached)
        pair.free(2, shared)
        assert pair.core.num_available == available
    assert pair.model.holds[2][cached[0]] == 2


def test_publishing_goes_on_only_behind_a_page_that_one_holds() -> None:
    pair = PairedCache(8)
    _, cached = pair.allocate(1, 1, None)
    pair.publish(1, "m", page_tokens("a"), cached, None)
    _, mine = pair.allocate(2, 1, None)
    assert pair.publish(2, "m", page_tokens("b"), mine, cached[0])[0] == "NOT_HELD"
    assert pair.publish(2, "m", page_tokens("b"), mine, mine[0])[0] == "BAD_REQUEST"
    assert pair.publish(2, "m", page_tokens("a"), cached, None)[0] == "NOT_HELD"
    pair.match(2, "m", page_tokens("a."))
    assert pair.publish(2, "n", page_tokens("b"), mine, cached[0])[0] == "BAD_REQUEST"
    assert pair.publish(2, "m", page_tokens("b"), mine, cached[0]) == ("ok", mine)


@pytest.mark.parametrize(("pages", "tokens"), [(0, ""), (1, ""), (1, "ab"), (2, "a")])
def test_a_publish_of_no_pages_or_of_other_pages_than_tokens_is_refused(
    pages: int, tokens: str
) -> None:
    pair = PairedCache(8)
    mine = pair.allocate(1, 2, None)[1][:pages]
    before = snapshot(pair.core)
    with pytest.raises(BadRequest):
        pair.core.publish(
            pair.sessions[1], Namespace(model="m"), page_tokens(tokens), packed(mine), None
        )
    assert snapshot(pair.core) == before


def test_refused_pages_leave_everything_where_it_was() -> None:
    """Two of four wanted pages could be had; none is taken, and the cached ones stay cached."""
    pair = PairedCache(6)
    _, pages = pair.allocate(1, 2, None)
    pair.publish(1, "m", page_tokens("ab"), pages, None)
    pair.free(1, pages)
    pair.allocate(2, 4, None)
    assert pair.allocate(3, 4, None) == ("NO_PAGES", 2)
    assert pair.acquire(3, "m", page_tokens("ab."), 3, None) == ("NO_PAGES", 1)
    assert pair.match(3, "m", page_tokens("ab.")) == ("ok", pages)


def test_a_dead_worker_leaves_what_it_published_and_nothing_else() -> None:
    pair = PairedCache(8)
    _, pages = pair.allocate(1, 3, None)
    pair.publish(1, "m", page_tokens("ab"), pages[:2], None)
    pair.share(1, pages)
    pair.match(2, "m", page_tokens("a."))
    pair.begin(1, 2)
    pair.end_session(1)
    assert pair.allocate(1, 1, None)[0] == "SESSION_ENDED"
    assert pair.core.num_available == 5  # it may still be reading and writing its pages
    pair.release_session(1)
    assert pair.core.num_available == 7
    assert pair.match(2, "m", page_tokens("ab.")) == ("ok", pages[:2])


def test_free_pages_go_out_in_order_and_those_freed_last_first() -> None:
    pair = PairedCache(6)
    assert pair.allocate(1, 3, None) == ("ok", [0, 1, 2])
    pair.free(1, [0])
    pair.free(1, [2])
    assert pair.allocate(1, 3, None) == ("ok", [2 + GENERATION, 0 + GENERATION, 3])


def test_a_generation_that_has_run_out_starts_anew() -> None:
    pages = FreeList(1)
    pages.take(1)
    pages.put(packed([0x7FFF_FFFF << 32]))
    assert unpacked(pages.take(1)) == [0]


# --- at random


@pytest.mark.parametrize("seed", range(12))
def test_the_core_does_what_the_model_does(seed: int) -> None:
    for i in range(SEQUENCES_A_SEED):
        workers = RandomWorkers(random.Random(seed * SEQUENCES_A_SEED + i))
        for _ in range(OPERATIONS):
            workers.step()
