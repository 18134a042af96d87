"""The baseline of bench-claims: its memory is what it says, and nothing idles in front."""

from __future__ import annotations

import random

import pytest

from kvd_shared.errors import BadRequest
from modelworker.requests import Delta, Emit, Failed, Finished, GenerationRequest, SamplingParams
from tests.benchmarks.claims.front import ReservingFront
from tests.benchmarks.claims.reservations import Buddy, FirstFit, Reservations

NUM_SLOTS = 64


def test_first_fit_against_a_bitmap() -> None:
    """The lowest run that is long enough is found whenever there is one, and no slot twice."""
    rng = random.Random(1)
    for _ in range(20):
        pool, owner = FirstFit(NUM_SLOTS), [-1] * NUM_SLOTS
        out = list[int]()
        for number in range(200):
            if out and rng.random() < 0.45:
                start = out.pop(rng.randrange(len(out)))
                pool.give_back(start)
                mine = owner[start]
                owner = [-1 if o == mine else o for o in owner]
            else:
                n = rng.randint(1, 20)
                fitting = (i for i in range(65 - n) if set(owner[i : i + n]) == {-1})
                expected = next(fitting, None)
                assert pool.take(n) == expected
                if expected is not None:
                    owner[expected : expected + n] = [number] * n
                    out.append(expected)
            assert pool.num_taken == sum(o != -1 for o in owner)


def test_buddy_against_a_bitmap() -> None:
    """Runs are powers of two at multiples of themselves; one is found whenever there is one."""
    rng = random.Random(2)
    for _ in range(20):
        pool, taken = Buddy(NUM_SLOTS), [False] * NUM_SLOTS
        out = dict[int, int]()
        for _ in range(200):
            if out and rng.random() < 0.45:
                start = rng.choice(list(out))
                n = out.pop(start)
                pool.give_back(start)
                taken[start : start + n] = [False] * n
            else:
                n = 1 << rng.randint(0, 5)
                asked = rng.randint(n // 2 + 1, n)
                assert pool.length_for(asked) == n
                possible = any(not any(taken[i : i + n]) for i in range(0, NUM_SLOTS, n))
                found = pool.take(asked)
                assert (found is not None) == possible
                if found is not None:
                    assert found % n == 0 and not any(taken[found : found + n])
                    taken[found : found + n] = [True] * n
                    out[found] = n
            assert pool.num_taken == sum(taken)


@pytest.mark.parametrize("kind", [FirstFit, Buddy])
def test_what_is_given_back_can_be_taken_whole(kind: type[FirstFit] | type[Buddy]) -> None:
    pool: Reservations = kind(NUM_SLOTS)
    starts = [pool.take(5) for _ in range(8)]
    random.Random(3).shuffle(starts)
    for start in starts:
        assert start is not None
        pool.give_back(start)
    assert pool.num_taken == 0
    assert pool.take(NUM_SLOTS) == 0


@pytest.mark.parametrize("kind", [FirstFit, Buddy])
def test_a_run_is_given_back_once(kind: type[FirstFit] | type[Buddy]) -> None:
    pool: Reservations = kind(NUM_SLOTS)
    start = pool.take(8)
    assert start is not None
    pool.give_back(start)
    with pytest.raises(KeyError):
        pool.give_back(start)


def test_a_buddy_pool_is_a_power_of_two() -> None:
    with pytest.raises(ValueError, match="96"):
        Buddy(96)


class Inside:
    """Stands for the engine: knows who is in, and ends them when told."""

    def __init__(self) -> None:
        self.emits: dict[str, Emit] = {}

    def submit(self, request: GenerationRequest, emit: Emit) -> None:
        self.emits[request.request_id] = emit

    def end(self, name: str) -> None:
        self.emits.pop(name)(Finished(0, "length", 1, 0))


def ask(name: str) -> GenerationRequest:
    params = SamplingParams(max_tokens=1, temperature=0)
    return GenerationRequest(request_id=name, prompt_ids=(1,), params=params)


def ignore(_: object) -> None:
    pass


def test_the_front_lets_in_what_fits_in_order() -> None:
    inside = Inside()
    front = ReservingFront(inside.submit, FirstFit(NUM_SLOTS))
    for name, num_slots in (("a", 40), ("b", 30), ("c", 10)):
        front.submit(ask(name), num_slots, ignore)
    assert list(inside.emits) == ["a"]  # c would fit, but b came first
    assert (front.num_queued, front.reservations.num_taken) == (2, 40)


def test_an_end_makes_room_at_once_and_a_token_does_not() -> None:
    inside = Inside()
    front = ReservingFront(inside.submit, FirstFit(NUM_SLOTS))
    told = list[object]()
    front.submit(ask("a"), 40, told.append)
    front.submit(ask("b"), 30, told.append)
    front.submit(ask("c"), 30, told.append)
    inside.emits["a"](Delta(0, "x", (1,)))
    assert list(inside.emits) == ["a"]
    inside.end("a")
    assert list(inside.emits) == ["b", "c"]
    assert [type(event) for event in told] == [Delta, Finished]
    inside.emits.pop("b")(Failed(BadRequest("no")))
    inside.end("c")
    assert (front.num_queued, front.reservations.num_taken) == (0, 0)


def test_free_slots_that_are_not_in_one_run_are_no_room() -> None:
    inside = Inside()
    front = ReservingFront(inside.submit, FirstFit(NUM_SLOTS))
    for name in "abcd":
        front.submit(ask(name), 16, ignore)
    front.submit(ask("wide"), 32, ignore)
    inside.end("a")
    inside.end("c")
    assert front.reservations.num_taken == 32 and "wide" not in inside.emits
    inside.end("b")
    assert "wide" in inside.emits


@pytest.mark.parametrize(("pool", "num_slots"), [(FirstFit(48), 49), (Buddy(64), 65)])
def test_what_can_never_fit_is_refused(pool: Reservations, num_slots: int) -> None:
    front = ReservingFront(Inside().submit, pool)
    with pytest.raises(ValueError, match=f"{pool.length_for(num_slots)} slots"):
        front.submit(ask("huge"), num_slots, ignore)
    assert front.num_queued == 0
