"""Requests with something wrong in them: each is answered with what it is, and changes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgpack
import pytest

from kvd_shared.namespace import Namespace
from kvd_shared.wire import TOKEN_LENGTH
from tests.integration.bad_frames import (
    DEEP,
    SPACE,
    TOKENS,
    Scene,
    ask,
    made_scene,
    ref_bytes,
)


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    with made_scene(tmp_path_factory.mktemp("daemon")) as scene:
        yield scene


HEADER = "a request's header has exactly"
ALLOCATE = {"num_pages": 1, "request": None}
MATCH = {"namespace": SPACE, "tokens": TOKENS}
ACQUIRE = MATCH | {"num_pages": 3}
WISH = {"priority": 35, "duration_s": None, "ttl_s": None}
RETAIN = {"refs": b"", "retention": WISH}
LONG = "x" * 100_000
Case = tuple[Any, Any, dict[str, Any], str, str]

BAD_REQUESTS: dict[str, Case] = {
    # the header
    "no seq": ("allocate", ALLOCATE, {"seq": ...}, "BAD_REQUEST", HEADER),
    "seq 0": ("allocate", ALLOCATE, {"seq": 0}, "BAD_REQUEST", HEADER),
    "a negative seq": ("allocate", ALLOCATE, {"seq": -1}, "BAD_REQUEST", HEADER),
    "seq true": ("allocate", ALLOCATE, {"seq": True}, "BAD_REQUEST", HEADER),
    "seq 1.5": ("allocate", ALLOCATE, {"seq": 1.5}, "BAD_REQUEST", HEADER),
    "no op": (..., ALLOCATE, {}, "BAD_REQUEST", HEADER),
    "no args": ("allocate", ..., {}, "BAD_REQUEST", HEADER),
    "a field more": ("allocate", ALLOCATE, {"extra": 1}, "BAD_REQUEST", HEADER),
    "another version": ("allocate", ALLOCATE, {"v": 2}, "PROTOCOL_MISMATCH", "version 2"),
    "no epoch": ("allocate", ALLOCATE, {"epoch": ...}, "BAD_REQUEST", HEADER),
    "a text as epoch": ("allocate", ALLOCATE, {"epoch": "1"}, "BAD_REQUEST", HEADER),
    "epoch true": ("allocate", ALLOCATE, {"epoch": True}, "BAD_REQUEST", HEADER),
    "an old epoch": ("allocate", ALLOCATE, {"epoch": 0}, "STALE_EPOCH", "epoch 0; this session is"),
    "an epoch to come": ("allocate", ALLOCATE, {"epoch": 2}, "STALE_EPOCH", "is in 1: resume"),
    "no deadline": ("allocate", ALLOCATE, {"deadline_ms": ...}, "BAD_REQUEST", HEADER),
    "a deadline of nil": ("allocate", ALLOCATE, {"deadline_ms": None}, "BAD_REQUEST", "deadline"),
    "deadline 1.5": ("allocate", ALLOCATE, {"deadline_ms": 1.5}, "BAD_REQUEST", "deadline_ms 1.5"),
    "deadline -1": ("allocate", ALLOCATE, {"deadline_ms": -1}, "BAD_REQUEST", "deadline_ms -1"),
    "a past deadline": ("allocate", ALLOCATE, {"deadline_ms": 1}, "DEADLINE_EXCEEDED", "after its"),
    # the session
    "no session": ("allocate", ALLOCATE, {"session": None}, "SESSION_ENDED", "attach again"),
    "an unknown token": ("allocate", ALLOCATE, {"session": b"t" * TOKEN_LENGTH}, "SESSION_ENDED",
                         "no live session has this token"),
    "an empty token": ("allocate", ALLOCATE, {"session": b""}, "SESSION_ENDED", "attach again"),
    "a text as token": ("allocate", ALLOCATE, {"session": "worker"}, "SESSION_ENDED", "attach"),
    "a number as token": ("allocate", ALLOCATE, {"session": 1}, "SESSION_ENDED", "attach again"),
    "a list as token": ("allocate", ALLOCATE, {"session": [b""]}, "SESSION_ENDED", "attach again"),
    # the operation
    "an unknown op": ("alocate", ALLOCATE, {}, "BAD_REQUEST", "no operation 'alocate'"),
    "a private name": ("__init__", {}, {}, "BAD_REQUEST", "no operation '__init__'"),
    "attach": ("attach", {}, {}, "BAD_REQUEST", "no operation 'attach'"),
    "a list as op": (["allocate"], ALLOCATE, {}, "BAD_REQUEST", "op ['allocate']"),
    "a map as op": ({}, {}, {}, "BAD_REQUEST", "op {}"),
    "a long op": (LONG, {}, {}, "BAD_REQUEST", "no operation 'xxx"),
    "a long op, no args": (LONG, None, {}, "BAD_REQUEST", "no operation 'xxx"),
    "a list as args": ("allocate", [1, None], {}, "BAD_REQUEST", "args must be a map, not list"),
    "nil as args": ("detach", None, {}, "BAD_REQUEST", "args must be a map, not NoneType"),
    # its arguments
    "an unknown argument": ("allocate", ALLOCATE | {"n": 1}, {}, "BAD_REQUEST",
                            "allocate: unknown argument 'n'"),
    "a long argument": ("allocate", ALLOCATE | {LONG: 1}, {}, "BAD_REQUEST",
                        "allocate: unknown argument 'xxx"),
    "bytes as an argument": ("allocate", ALLOCATE | {b"n": 1}, {}, "BAD_REQUEST", "unknown argum"),
    "a missing argument": ("allocate", {"request": None}, {}, "BAD_REQUEST",
                           "allocate: argument 'num_pages' is missing"),
    "detach with arguments": ("detach", {"now": True}, {}, "BAD_REQUEST", "unknown argument 'now'"),
    "a text as count": ("allocate", ALLOCATE | {"num_pages": "1"}, {}, "BAD_REQUEST",
                        "allocate: num_pages = '1' must be a whole number"),
    "a float as count": ("allocate", ALLOCATE | {"num_pages": 1.0}, {}, "BAD_REQUEST", "= 1.0 "),
    "true as count": ("allocate", ALLOCATE | {"num_pages": True}, {}, "BAD_REQUEST", "= True "),
    "a long text as count": ("allocate", ALLOCATE | {"num_pages": LONG}, {}, "BAD_REQUEST", "xxx"),
    "a deep list as count": ("allocate", ALLOCATE | {"num_pages": [[[[[[[[[1]]]]]]]]]}, {},
                             "BAD_REQUEST", "must be a whole number"),
    "0 pages": ("allocate", ALLOCATE | {"num_pages": 0}, {}, "BAD_REQUEST", "a count of 0"),
    "-1 pages": ("allocate", ALLOCATE | {"num_pages": -1}, {}, "BAD_REQUEST", "a count of -1"),
    "too many pages": ("allocate", ALLOCATE | {"num_pages": 65}, {}, "BAD_REQUEST", "pool's 64"),
    "2^64-1 pages": ("allocate", ALLOCATE | {"num_pages": 2**64 - 1}, {}, "BAD_REQUEST", "count"),
    "2^63 sequences": ("begin", {"count": 2**63}, {}, "BAD_REQUEST", "a count of"),
    "-2^63 sequences": ("begin", {"count": -(2**63)}, {}, "BAD_REQUEST", "a count of"),
    "a text as request": ("allocate", ALLOCATE | {"request": "1"}, {}, "BAD_REQUEST",
                          "allocate: request = '1' must be a whole number or nil"),
    "an unknown request": ("allocate", ALLOCATE | {"request": 999}, {}, "UNKNOWN_REQUEST", "999"),
    "end of an unknown one": ("end", {"request": -(2**63)}, {}, "UNKNOWN_REQUEST", "request -92"),
    "yielding an unknown one": ("yielded", {"request": 0}, {}, "UNKNOWN_REQUEST", "request 0"),
    "nil as request to end": ("end", {"request": None}, {}, "BAD_REQUEST", "request = None"),
    # arrays
    "a list as tokens": ("match", MATCH | {"tokens": [1, 2]}, {}, "BAD_REQUEST",
                         "tokens must be bytes or a frame number, not list"),
    "true as tokens": ("match", MATCH | {"tokens": True}, {}, "BAD_REQUEST", "not bool"),
    "no tokens": ("match", MATCH | {"tokens": b""}, {}, "BAD_REQUEST", "no tokens"),
    "tokens cut": ("match", MATCH | {"tokens": TOKENS[:-1]}, {}, "BAD_REQUEST",
                   "tokens has 127 bytes, no multiple of 4"),
    "refs cut": ("free", {"refs": b"1234567"}, {}, "BAD_REQUEST", "refs has 7 bytes, no multiple"),
    "frame 0": ("match", MATCH | {"tokens": 0}, {}, "BAD_REQUEST", "tokens names raw frame 0"),
    "frame 1 of 0": ("match", MATCH | {"tokens": 1}, {}, "BAD_REQUEST", "the message has 0"),
    "frame -1": ("match", MATCH | {"tokens": -1}, {}, "BAD_REQUEST", "tokens names raw frame -1"),
    "frame 2^63": ("match", MATCH | {"tokens": 2**63}, {}, "BAD_REQUEST", "names raw frame 9223"),
    # token ids
    "a negative token": ("match", MATCH | {"tokens": b"\1\0\0\0" + b"\xff" * 4}, {}, "BAD_REQUEST",
                         "match: token 1 has the id -1: must be from 0 to 2147483647"),
    # numbers that are none
    "a text as flag": ("acquire", ACQUIRE | {"announce": 1}, {}, "BAD_REQUEST",
                       "acquire: announce = 1 must be true or false"),
    "a rate of 0": ("acquire", ACQUIRE | {"own_rate": 0}, {}, "BAD_REQUEST", "must be above 0"),
    "a rate that is none": ("acquire", ACQUIRE | {"own_rate": float("nan")}, {}, "BAD_REQUEST",
                            "own_rate = nan must be above 0"),
    "an endless rate": ("acquire", ACQUIRE | {"own_rate": float("inf")}, {}, "BAD_REQUEST", "inf"),
    "a rate of nobody": ("acquire", ACQUIRE | {"own_rate": 9.5}, {}, "BAD_REQUEST",
                         "only a request with a number can announce or wait"),
    "an announcement of nobody": ("acquire", ACQUIRE | {"announce": True}, {}, "BAD_REQUEST",
                                  "only a request with a number can announce or wait"),
    "a partial of nothing": ("match", MATCH | {"min_partial": 0}, {}, "BAD_REQUEST",
                             "min_partial = 0: must be from 1 to 15 tokens, or nil"),
    "a partial of a page": ("match", MATCH | {"min_partial": 16}, {}, "BAD_REQUEST", "1 to 15"),
    "a list as retention": ("retain", RETAIN | {"retention": [35]}, {}, "BAD_REQUEST",
                            "retention must be a map or nil"),
    "a retention cut": ("retain", RETAIN | {"retention": {"priority": 35}}, {}, "BAD_REQUEST",
                        "retention must be nil or a map with exactly"),
    "priority 101": ("retain", RETAIN | {"retention": WISH | {"priority": 101}}, {}, "BAD_REQUEST",
                     "priority 101: must be a whole number from 0 to 100"),
    "priority true": ("retain", RETAIN | {"retention": WISH | {"priority": True}}, {},
                      "BAD_REQUEST", "priority True"),
    "0 seconds": ("retain", RETAIN | {"retention": WISH | {"ttl_s": 0}}, {}, "BAD_REQUEST",
                  "ttl_s = 0: must be a number of seconds above 0"),
    "a text as seconds": ("hand_over", {"refs": b"", "ttl_s": "1"}, {}, "BAD_REQUEST",
                          "hand_over: ttl_s = '1' must be a number of seconds"),
    "a map as requests": ("fork_sequence", {"sequence": 1, "requests": {}}, {}, "BAD_REQUEST",
                          "requests must be a list of at most 1024"),
    "a text in requests": ("fork_sequence", {"sequence": 1, "requests": [None, "1"]}, {},
                           "BAD_REQUEST", "requests: '1' must be a whole number or nil"),
    "too many forks": ("fork_sequence", {"sequence": 1, "requests": [None] * 1025}, {},
                       "BAD_REQUEST", "at most 1024"),
    "too many rows": ("close_sequences", {"sequences": bytes(8 * 4097)}, {}, "BAD_REQUEST",
                      "4097 sequences: at most 4096 in one call"),
    # namespaces
    "a text as namespace": ("match", MATCH | {"namespace": "m"}, {}, "BAD_REQUEST", "namespace"),
    "a frame as namespace": ("match", MATCH | {"namespace": 1}, {}, "BAD_REQUEST", "namespace"),
    "an empty namespace": ("match", MATCH | {"namespace": b""}, {}, "BAD_REQUEST", "namespace"),
    "a deep namespace": ("match", MATCH | {"namespace": DEEP}, {}, "BAD_REQUEST", "namespace"),
    "a short namespace": ("match", MATCH | {"namespace": msgpack.packb(["m", 0, b""])}, {},
                          "BAD_REQUEST", "namespace is not [model, version, adapter, salt]"),
    "a long namespace": ("match", MATCH | {"namespace": msgpack.packb([LONG, 0, b"", b""])}, {},
                         "BAD_REQUEST", "the limit is 1024 bytes"),
    "texts as bytes": ("match", MATCH | {"namespace": msgpack.packb(["m", 0, "", ""])}, {},
                       "BAD_REQUEST", "wanted [str, int, bytes, bytes]"),
    "version -1": ("match", MATCH | {"namespace": msgpack.packb(["m", -1, b"", b""])}, {},
                   "BAD_REQUEST", "weights version -1: must be"),
    # roles
    "a worker's status": ("status", {}, {}, "NOT_ALLOWED", "status needs role admin"),
    "a worker's flush": ("flush", {}, {}, "NOT_ALLOWED", "flush needs role admin"),
    "a worker's tree": ("tree", {"pool": None, "max_nodes": 1}, {}, "NOT_ALLOWED", "role admin"),
    "declaring unasked": ("declare", {"refs": b"", "counts": b"", "done": True}, {}, "BAD_REQUEST",
                          "is not resuming"),
    # steps
    "a map as calls": ("step", {"calls": {}}, {}, "BAD_REQUEST", "step: calls must be a list"),
    "too many calls": ("step", {"calls": [1] * 4097}, {}, "BAD_REQUEST", "at most 4096"),
    "no calls": ("step", {}, {}, "BAD_REQUEST", "step: argument 'calls' is missing"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_REQUESTS)
def test_a_bad_request_is_refused(scene: Scene, case: str) -> None:
    op, args, header, code, message = BAD_REQUESTS[case]
    refused = scene.refused(code)
    with scene.nothing_changes():
        reply = ask(scene, op, args, **header)
    assert scene.refused(code) == refused + 1
    assert reply["error"]["code"] == code
    assert message in reply["error"]["message"]
    assert len(msgpack.packb(reply)) < 1000
    unread = "seq" in header or "v" in header
    assert (reply["epoch"], reply["seq"]) == (1, 0 if unread else scene.asked)


def test_page_references_that_are_none_are_refused(scene: Scene) -> None:
    published, _, own, _ = scene.held
    past = own + (1 << 32)
    cases: list[tuple[str, dict[str, Any], str, str]] = [
        ("free", {"refs": ref_bytes(past)}, "NOT_HELD", "generation 0: a reference kept"),
        ("free", {"refs": ref_bytes(own, past)}, "NOT_HELD", "is at generation 0"),
        ("free", {"refs": ref_bytes(own, own)}, "BAD_REQUEST", "named twice"),
        ("free", {"refs": ref_bytes(63)}, "NOT_HELD", "it does not hold that page"),
        ("free", {"refs": ref_bytes(64)}, "NOT_HELD", "the pool has pages 0 to 63"),
        ("free", {"refs": ref_bytes(-1)}, "NOT_HELD", "the pool has pages 0 to 63"),
        ("free", {"refs": ref_bytes(own - (1 << 62))}, "NOT_HELD", "is at generation 0"),
        ("free", {"refs": ref_bytes(-(2**63))}, "NOT_HELD", "is at generation 0"),
        ("share", {"refs": ref_bytes(own, 2**63 - 1)}, "NOT_HELD", "the pool has pages 0 to 63"),
    ]
    publish = {"namespace": SPACE, "tokens": TOKENS, "after": None}
    other = {"namespace": SPACE, "tokens": TOKENS[::-1], "after": None}
    cases += [
        ("publish", publish | {"refs": ref_bytes(own)}, "BAD_REQUEST", "every page has 16 tokens"),
        ("publish", publish | {"refs": b""}, "BAD_REQUEST", "there must be at least one"),
        ("publish", publish | {"refs": ref_bytes(own, own)}, "BAD_REQUEST", "named twice"),
        ("publish", publish | {"refs": ref_bytes(own, -1)}, "NOT_HELD", "the pool has pages"),
        ("publish", other | {"refs": ref_bytes(published, own)}, "BAD_REQUEST", "sealed in the"),
        ("publish", other | {"refs": ref_bytes(own, past)}, "NOT_HELD", "is at generation 0"),
        ("publish", other | {"refs": scene.held[2]}, "BAD_REQUEST", "refs names raw frame 2"),
    ]
    for after, code, message in [
        (own, "BAD_REQUEST", "is not in the tree: publish it as well"),
        (63, "NOT_HELD", "does not hold that page"),
        (-1, "BAD_REQUEST", "after = -1 is no page reference"),
        (2**63, "BAD_REQUEST", "is no page reference"),
        (1.5, "BAD_REQUEST", "after = 1.5 must be a whole number"),
        (2**32 + published, "NOT_HELD", "is at generation 0"),
    ]:
        args = publish | {"refs": ref_bytes(*scene.held[2:]), "after": after}
        cases.append(("publish", args, code, message))
    elsewhere = publish | {"namespace": Namespace(model="n").to_wire(), "after": published}
    cases.append(("publish", elsewhere | {"refs": ref_bytes(*scene.held[2:])},
                  "BAD_REQUEST", "belongs to another namespace"))  # fmt: skip
    with scene.nothing_changes():
        for op, args, code, message in cases:
            error = ask(scene, op, args)["error"]
            assert (error["code"], message in error["message"]) == (code, True), (op, args, error)


def test_a_bad_call_in_a_step_fails_alone(scene: Scene) -> None:
    calls = [
        {"op": "free", "args": {"refs": ref_bytes(63)}},
        {"op": "step", "args": {"calls": []}},
        {"op": "detach", "args": {}},
        {"op": "status", "args": {}},
        {"op": ["free"], "args": {}},
        {"op": "free"},
        {"op": "free", "args": {"refs": b""}, "more": 1},
        "free",
        {"op": LONG, "args": {}},
        {"op": "allocate", "args": [LONG]},
        {"op": "probe", "args": MATCH | {"tokens": 1}},
    ]
    with scene.nothing_changes():
        reply = ask(scene, "step", {"calls": calls}, TOKENS + TOKENS)
    *errors, probed = reply["result"]["results"]
    codes = [entry["error"]["code"] for entry in errors]
    assert codes == ["NOT_HELD"] + ["BAD_REQUEST"] * 9
    assert probed == {"result": {"matched_tokens": 32}}
    assert len(msgpack.packb(reply)) < 3000


def test_one_frame_named_by_many_calls_is_read_so_often_only(scene: Scene) -> None:
    """A step's arrays count as often as they are named: 4,096 calls cannot ask for 4,096 times the
    work of one frame. What is over the bound is refused, the rest is done."""
    tokens = bytes(4 << 20)
    calls = [{"op": "probe", "args": {"namespace": SPACE, "tokens": 1}}] * 4096
    refused = scene.refused("TOO_LARGE")
    with scene.nothing_changes():
        reply = ask(scene, "step", {"calls": calls}, tokens)
    results = reply["result"]["results"]
    assert [("result" in r) for r in results] == [True] * 8 + [False] * 4088
    assert {r["error"]["code"] for r in results[8:]} == {"TOO_LARGE"}
    assert results[8]["error"]["details"] == {"size": 4 << 20, "limit": 32 << 20}
    assert scene.refused("TOO_LARGE") == refused + 4088


def test_a_fork_counts_its_pages_once_for_each_copy(scene: Scene) -> None:
    calls = [{"op": "fork", "args": {"refs": 1, "num_tokens": 1, "count": 1024}}]
    with scene.nothing_changes():
        reply = ask(scene, "step", {"calls": calls}, ref_bytes(*range(8192)))
    [result] = reply["result"]["results"]
    assert result["error"]["code"] == "TOO_LARGE"


@pytest.mark.parametrize("op", ["match", "probe", "acquire", "publish", "announce"])
def test_a_prompt_over_the_limit_is_refused_unread(scene: Scene, op: str) -> None:
    """By its length alone: the ids, which are none, are not looked at."""
    more: dict[str, dict[str, Any]]
    more = {"acquire": {"num_pages": 1}, "publish": {"refs": b""}, "announce": {"request": 1}}
    args = {"namespace": SPACE, "tokens": 1} | more.get(op, {})
    with scene.nothing_changes():
        error = ask(scene, op, args, b"\xff" * (4 << 20) + bytes(4))["error"]
    assert error["code"] == "OVER_LIMIT"
    most = 1 << 20
    assert error["details"] == {"limit": "max_prompt_tokens", "value": most + 1, "most": most}
