"""Every argument of every operation, out of its range: a typed error that names the value, and not
a bit is changed (`PairedCache` compares all of the state before and after)."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from kvd.options import CacheOptions, Limits
from kvd.retention import NO_WISH, Retention
from kvd_shared.errors import BadRequest
from kvd_shared.namespace import Namespace
from kvd_shared.refs import GENERATION, TOKEN_BYTES
from tests.kvd.paired_cache import PairedCache
from tests.kvd.tokens import PAGE_SIZE, page_tokens

M = Namespace(model="m")
NUM_PAGES = 16
A = page_tokens("a")


class World:
    """One session with a page of each kind, a request, a sequence; what another has is not its."""

    def __init__(self) -> None:
        limits = Limits(max_prompt_tokens=64, max_pages_a_session=12, max_requests_a_session=4)
        pair = self.pair = PairedCache(NUM_PAGES, options=CacheOptions(limits=limits))
        self.number = pair.begin(1, 1)[1]
        self.waiting = pair.begin(1, 1)[1]
        self.other_number = pair.begin(2, 1)[1]
        cached, self.writing, tail = pair.allocate(1, 3, self.number)[1]
        (self.leased,) = pair.lease(1, 1, None)[1]
        pair.publish(1, M, A, [cached], None)
        pair.seal_tail(1, tail, 3)
        self.cached, self.tail = cached, tail
        (self.other,) = pair.allocate(2, 1, None)[1]
        self.handle = pair.open_sequence(1, M, page_tokens("xy"), None, 0)[1][0]
        self.other_handle = pair.open_sequence(2, M, page_tokens("q"), None, 0)[1][0]
        pair.hand_over(1, [tail], b"ticket", 5.0)
        pair.share(1, [cached])


Act = Callable[..., tuple[str, object]]  # of a World
CASES: dict[str, tuple[str, Act]] = {}


def case(name: str, code: str, act: Act) -> None:
    assert name not in CASES
    CASES[name] = code, act


BAD_COUNTS = (0, -1, NUM_PAGES + 1, 1 << 40)
for n in BAD_COUNTS:
    case(f"allocate {n}", "BAD_REQUEST", lambda w, n=n: w.pair.allocate(1, n, None))
    case(f"lease {n}", "BAD_REQUEST", lambda w, n=n: w.pair.lease(1, n, None))
    case(f"acquire {n}", "BAD_REQUEST", lambda w, n=n: w.pair.acquire(1, M, A, n, None))
for n in (0, -1, 4097):
    case(f"begin {n}", "BAD_REQUEST", lambda w, n=n: w.pair.begin(1, n))
case("begin too many", "OVER_LIMIT", lambda w: w.pair.begin(1, 3))
case("allocate over the limit", "OVER_LIMIT", lambda w: w.pair.allocate(1, 9, None))
case("lease over the limit", "OVER_LIMIT", lambda w: w.pair.lease(1, 9, None))
case("acquire over the limit", "OVER_LIMIT", lambda w: w.pair.acquire(1, M, A, 9, None))
case("no tokens", "BAD_REQUEST", lambda w: w.pair.match(1, M, b""))
case("no tokens to probe", "BAD_REQUEST", lambda w: w.pair.probe(1, M, b""))
case("no tokens to acquire", "BAD_REQUEST", lambda w: w.pair.acquire(1, M, b"", 1, None))
case("no tokens to open", "BAD_REQUEST", lambda w: w.pair.open_sequence(1, M, b"", None, 0))
case("too many tokens", "OVER_LIMIT", lambda w: w.pair.match(1, M, page_tokens("a" * 9)))
for n in (0, -1, PAGE_SIZE, 1 << 40):
    case(f"min_partial {n}", "BAD_REQUEST", lambda w, n=n: w.pair.match(1, M, A, n))
    case(
        f"acquire, min_partial {n}", "BAD_REQUEST",
        lambda w, n=n: w.pair.acquire(1, M, A, 1, None, n),
    )  # fmt: skip
    case(
        f"open, min_partial {n}", "BAD_REQUEST",
        lambda w, n=n: w.pair.open_sequence(1, M, A, None, 0, n),
    )  # fmt: skip
for rate in (0.0, -1.0, math.nan):
    case(
        f"rate {rate}", "BAD_REQUEST", lambda w, r=rate: w.pair.wait(1, w.waiting, M, A, r)
    )  # fmt: skip
    case(
        f"acquire at rate {rate}", "BAD_REQUEST",
        lambda w, r=rate: w.pair.acquire(1, M, A, 1, w.waiting, rate=r),
    )  # fmt: skip
for n in (0, -1, 99):
    case(f"request {n}", "UNKNOWN_REQUEST", lambda w, n=n: w.pair.allocate(1, 1, n))
    case(f"end {n}", "UNKNOWN_REQUEST", lambda w, n=n: w.pair.end(1, n))
    case(f"yielded {n}", "UNKNOWN_REQUEST", lambda w, n=n: w.pair.yielded(1, n))
    case(f"announce {n}", "UNKNOWN_REQUEST", lambda w, n=n: w.pair.announce(1, n, M, A))
    case(f"wait {n}", "UNKNOWN_REQUEST", lambda w, n=n: w.pair.wait(1, n, M, A, 1.0))
    case(f"sequence {n}", "UNKNOWN_HANDLE", lambda w, n=n: w.pair.close(1, [n]))
    case(f"fork sequence {n}", "UNKNOWN_HANDLE", lambda w, n=n: w.pair.fork_sequence(1, n, [None]))
    case(f"release {n}", "UNKNOWN_HANDLE", lambda w, n=n: w.pair.operator_release(n))
case("another's request", "UNKNOWN_REQUEST", lambda w: w.pair.allocate(1, 1, w.other_number))
case("end another's", "UNKNOWN_REQUEST", lambda w: w.pair.end(1, w.other_number))
case("announce, not running", "BAD_REQUEST", lambda w: w.pair.announce(1, w.waiting, M, A))
case("wait while running", "BAD_REQUEST", lambda w: w.pair.wait(1, w.number, M, A, 1.0))
case("announce as nobody", "BAD_REQUEST", lambda w: w.pair.acquire(1, M, A, 1, None, announce=True))
case("wait as nobody", "BAD_REQUEST", lambda w: w.pair.acquire(1, M, A, 1, None, rate=1.0))

for name, ref in {
    "no page": lambda w: -1,
    "a page beyond the pool": lambda w: NUM_PAGES,
    "far beyond": lambda w: (1 << 62) + 5,
    "a free page": lambda w: min(w.pair.model.tree.free),
    "another's page": lambda w: w.other,
    "a later generation": lambda w: w.writing + GENERATION,
    "an earlier generation": lambda w: w.writing - GENERATION,
    "a ticket's page": lambda w: w.tail,
}.items():
    operations: dict[str, Callable[[World, int], tuple[str, object]]] = {
        "free": lambda w, r: w.pair.free(1, [w.writing, r]),
        "share": lambda w, r: w.pair.share(1, [w.writing, r]),
        "use": lambda w, r: w.pair.use(1, [w.leased, r]),
        "retain": lambda w, r: w.pair.retain(1, [w.cached, r], NO_WISH),
        "fork": lambda w, r: w.pair.fork(1, [r], 1, 1, None),
        "make_writable": lambda w, r: w.pair.make_writable(1, r, None),
        "seal_tail": lambda w, r: w.pair.seal_tail(1, r, 1),
        "hand_over": lambda w, r: w.pair.hand_over(1, [w.cached, r], b"t", 1.0),
        "publish": lambda w, r: w.pair.publish(1, M, page_tokens("z"), [r], None),
        "publish behind": lambda w, r: w.pair.publish(1, M, page_tokens("z"), [w.writing], r),
    }
    for what, act in operations.items():
        case(f"{what}: {name}", "NOT_HELD", lambda w, act=act, ref=ref: act(w, ref(w)))

for what, twice in {
    "free": lambda w: w.pair.free(1, [w.writing, w.writing]),
    "free cached": lambda w: w.pair.free(1, [w.cached, w.writing, w.cached]),
    "share": lambda w: w.pair.share(1, [w.writing, w.writing]),
    "use": lambda w: w.pair.use(1, [w.leased, w.leased]),
    "hand_over": lambda w: w.pair.hand_over(1, [w.cached, w.cached], b"t", 1.0),
    "publish": lambda w: w.pair.publish(1, M, page_tokens("zz"), [w.writing] * 2, None),
}.items():
    case(f"{what}: a page twice", "BAD_REQUEST", twice)

case("publish nothing", "BAD_REQUEST", lambda w: w.pair.publish(1, M, b"", [], None))
case("a page without tokens", "BAD_REQUEST", lambda w: w.pair.publish(1, M, b"", [w.writing], None))
case("half a page", "BAD_REQUEST", lambda w: w.pair.publish(1, M, A[:-4], [w.writing], None))
case(
    "publish leased",
    "BAD_REQUEST",
    lambda w: w.pair.publish(1, M, A * 2, [w.cached, w.leased], None),
)
case(
    "publish a cached page for other tokens", "BAD_REQUEST",
    lambda w: w.pair.publish(1, M, page_tokens("z"), [w.cached], None),
)  # fmt: skip
case(
    "publish behind a page that is not in the tree", "BAD_REQUEST",
    lambda w: w.pair.publish(1, M, page_tokens("z"), [w.writing], w.writing),
)  # fmt: skip
case(
    "publish behind a page of another namespace", "BAD_REQUEST",
    lambda w: w.pair.publish(1, Namespace(model="n"), A, [w.writing], w.cached),
)  # fmt: skip
case("use what is in use", "BAD_REQUEST", lambda w: w.pair.use(1, [w.writing]))
case("retain what is not cached", "BAD_REQUEST", lambda w: w.pair.retain(1, [w.writing], NO_WISH))
case("write to what is leased", "BAD_REQUEST", lambda w: w.pair.make_writable(1, w.leased, None))
for n in (0, -1, PAGE_SIZE, 1 << 40):
    case(f"a tail of {n}", "BAD_REQUEST", lambda w, n=n: w.pair.seal_tail(1, w.writing, n))
case("seal what is cached", "BAD_REQUEST", lambda w: w.pair.seal_tail(1, w.cached, 1))
case("seal what is leased", "BAD_REQUEST", lambda w: w.pair.seal_tail(1, w.leased, 1))
for n in (0, -1, 1025):
    case(f"fork into {n}", "BAD_REQUEST", lambda w, n=n: w.pair.fork(1, [w.cached], 1, n, None))
for n in (0, -1, PAGE_SIZE + 1, 1 << 40):
    case(f"fork {n} tokens", "BAD_REQUEST", lambda w, n=n: w.pair.fork(1, [w.cached], n, 1, None))
case("fork no pages", "BAD_REQUEST", lambda w: w.pair.fork(1, [], 1, 1, None))
case(
    "fork more pages than tokens", "BAD_REQUEST",
    lambda w: w.pair.fork(1, [w.cached, w.writing], PAGE_SIZE, 1, None),
)  # fmt: skip
case(
    "fork into more than the pool", "BAD_REQUEST", lambda w: w.pair.fork(1, [w.cached], 1, 17, None)
)
for n in (-1, 65, 1 << 40):
    case(f"ahead {n}", "BAD_REQUEST", lambda w, n=n: w.pair.open_sequence(1, M, A, None, n))
case("fork into no sequences", "BAD_REQUEST", lambda w: w.pair.fork_sequence(1, w.handle, []))
case(
    "fork into an unknown request", "UNKNOWN_REQUEST",
    lambda w: w.pair.fork_sequence(1, w.handle, [None, 99]),
)  # fmt: skip
case("another's sequence", "UNKNOWN_HANDLE", lambda w: w.pair.close(1, [w.handle, w.other_handle]))
case("close twice at once", "BAD_REQUEST", lambda w: w.pair.close(1, [w.handle, w.handle]))
case("hand over nothing", "BAD_REQUEST", lambda w: w.pair.hand_over(1, [], b"t", 1.0))
case(
    "hand over what is written",
    "BAD_REQUEST",
    lambda w: w.pair.hand_over(1, [w.writing], b"t", 1.0),
)
case(
    "hand over what is leased", "BAD_REQUEST", lambda w: w.pair.hand_over(1, [w.leased], b"t", 1.0)
)
for s in (0.0, -1.0, 601.0, math.inf, math.nan):
    case(
        f"ticket for {s} s", "BAD_REQUEST", lambda w, s=s: w.pair.hand_over(1, [w.cached], b"t", s)
    )
case("no such ticket", "UNKNOWN_HANDLE", lambda w: w.pair.take_over(2, b"none"))
for s in (0.0, -1.0, math.inf, math.nan):
    case(f"retain for {s} s", "BAD_REQUEST", lambda w, s=s: w.pair.operator_retain(M, A, s))
case("retain what is not there", "BAD_REQUEST", lambda w: w.pair.operator_retain(M, A[:4], None))
for n in (0, -1, 1 << 63):
    case(f"version {n}", "BAD_REQUEST", lambda w, n=n: w.pair.raise_weights_version("m", n))
    case(f"version {n} of all", "BAD_REQUEST", lambda w, n=n: w.pair.raise_weights_version(None, n))


@pytest.mark.parametrize("name", CASES)
def test_what_is_out_of_range_is_refused_and_changes_nothing(name: str) -> None:
    code, act = CASES[name]
    assert act(World())[0] == code


@pytest.mark.parametrize("operation", [
    lambda w: w.pair.begin(1, 1),
    lambda w: w.pair.end(1, w.number),
    lambda w: w.pair.yielded(1, w.number),
    lambda w: w.pair.match(1, M, A),
    lambda w: w.pair.probe(1, M, A),
    lambda w: w.pair.acquire(1, M, A, 1, None),
    lambda w: w.pair.announce(1, w.number, M, A),
    lambda w: w.pair.wait(1, w.waiting, M, A, 1.0),
    lambda w: w.pair.allocate(1, 1, None),
    lambda w: w.pair.lease(1, 1, None),
    lambda w: w.pair.use(1, [w.leased]),
    lambda w: w.pair.share(1, [w.cached]),
    lambda w: w.pair.free(1, [w.cached]),
    lambda w: w.pair.fork(1, [w.cached], PAGE_SIZE, 1, None),
    lambda w: w.pair.make_writable(1, w.writing, None),
    lambda w: w.pair.seal_tail(1, w.writing, 1),
    lambda w: w.pair.publish(1, M, A, [w.cached], None),
    lambda w: w.pair.retain(1, [w.cached], NO_WISH),
    lambda w: w.pair.open_sequence(1, M, A, None, 0),
    lambda w: w.pair.extend(1, [(w.handle, 0, b"")]),
    lambda w: w.pair.fork_sequence(1, w.handle, [None]),
    lambda w: w.pair.close(1, [w.handle]),
    lambda w: w.pair.hand_over(1, [w.cached], b"t", 1.0),
    lambda w: w.pair.take_over(1, b"ticket"),
])  # fmt: skip
def test_an_ended_session_is_refused_everything(operation: Act) -> None:
    world = World()
    world.pair.end_session(1)
    assert operation(world)[0] == "SESSION_ENDED"


def test_the_rows_of_an_extend_are_refused_one_by_one() -> None:
    """An unknown handle, another session's, and counts of computed tokens that cannot be; the good
    row between them is done."""
    world = World()
    rows = [
        (99, 0, b""),
        (world.other_handle, 0, b""),
        (world.handle, -1, b""),
        (world.handle, 2 * PAGE_SIZE + 1, b""),
        (world.handle, 2 * PAGE_SIZE, b"\1" * TOKEN_BYTES),
        (world.handle, PAGE_SIZE, b""),
    ]
    answer, done = world.pair.extend(1, rows)
    assert answer == "ok" and [status for status, _, _ in done] == [2, 2, 3, 3, 0, 3]


def test_an_extend_whose_columns_do_not_fit_is_refused() -> None:
    world = World()
    cache, one = world.pair.core, world.pair.sessions[1]
    from array import array

    for handles, computed, counts, tokens in (
        ([1, 1], [0], [0], b""),
        ([1], [0], [0, 0], b""),
        ([1], [0], [-1], b""),
        ([1], [0], [2], A[:4]),
        ([1], [0], [0], A[:4]),
    ):
        with pytest.raises(BadRequest):
            cache.sequences.extend(
                one, array("q", handles), array("i", computed), array("i", counts), tokens, 0.0
            )
        world.pair.check()


@pytest.mark.parametrize("fields", [
    {"priority": -1}, {"priority": 101}, {"priority": 1.0}, {"priority": True}, {"ttl_s": 0},
    {"ttl_s": -1.0}, {"ttl_s": math.nan}, {"ttl_s": math.inf}, {"ttl_s": "1"}, {"duration_s": 0},
    {"duration_s": math.inf}, {"duration_s": True},
])  # fmt: skip
def test_a_wish_out_of_range_is_refused(fields: dict[str, object]) -> None:
    with pytest.raises(BadRequest) as refused:
        Retention(**fields)  # type: ignore[arg-type]
    assert next(iter(fields)) in refused.value.message


def test_pages_ahead_and_open_sequences_have_their_limits() -> None:
    """In a pool that has more pages than that."""
    limits = Limits(max_requests_a_session=3)
    pair = PairedCache(100, options=CacheOptions(limits=limits))
    assert pair.open_sequence(1, M, A, None, 65)[0] == "BAD_REQUEST"
    assert [pair.open_sequence(1, M, A, None, n)[0] for n in (64, 0, 0, 0)] == [
        "ok", "ok", "ok", "OVER_LIMIT",
    ]  # fmt: skip
    assert pair.open_sequence(2, M, A, None, 0)[0] == "ok"


def test_a_draining_pool_begins_no_more_requests_and_goes_on_with_those_it_has() -> None:
    world = World()
    world.pair.core.draining = True
    assert world.pair.begin(1, 1)[0] == "DRAINING"
    assert world.pair.allocate(1, 1, world.number)[0] == "ok"
