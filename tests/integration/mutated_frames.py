"""Right calls of all kinds, faults put into their frames at random, and what these leave alone."""

from __future__ import annotations

from random import Random
from typing import Any

from kvd.cache import CacheManager
from kvd_shared import verbs
from tests.integration.bad_frames import NAMESPACE


def good_calls(
    random: Random,
    held: list[int],
    request: int,
    in_tree: list[int] | None = None,
    handles: list[int] | None = None,
    ticket: bytes = bytes(16),
) -> list[verbs.Call[Any]]:
    """Calls of all kinds, some of which are refused even before they are mutated."""
    zeros = random.random() < 0.3  # so that some prompts are found
    tokens = [0 if zeros else random.randrange(3) for _ in range(random.randrange(1, 40))]
    refs = random.sample(held, min(len(held), 3))
    sealed = random.sample(in_tree or held, 1)
    count = random.randrange(1, 5)
    whole = [0 if zeros else random.randrange(2) for _ in range(8 * len(refs))]
    after = random.choice([None, *held])
    sequence, new = random.choice(handles or [1]), random.randrange(20)
    request_or_none = random.choice([None, request])
    wish = verbs.Retention(priority=random.randrange(101), ttl_s=random.choice([None, 0.001, 5.0]))
    calls: list[verbs.Call[Any]] = [
        verbs.match(NAMESPACE, tokens, random.choice([None, 1])),
        verbs.probe(NAMESPACE, tokens),
        verbs.acquire(NAMESPACE, tokens, count, request_or_none),
        verbs.acquire(NAMESPACE, tokens, count, request, announce=True, own_rate=100.0),
        verbs.allocate(count, request_or_none),
        verbs.lease(count, request_or_none),
        verbs.use(refs),
        verbs.share(refs),
        verbs.free(refs),
        verbs.publish(NAMESPACE, whole, refs, after, random.choice([None, wish])),
        verbs.retain(sealed, wish),
        verbs.fork(refs, random.randrange(8 * len(refs) + 1), count, request_or_none),
        verbs.make_writable(refs[0], request_or_none),
        verbs.seal_tail(refs[0], random.randrange(9)),
        verbs.hand_over(sealed, 5.0),
        verbs.take_over(ticket),
        verbs.match(NAMESPACE, range(1024 + random.randrange(64))),  # as a raw frame
        verbs.begin(count),
        verbs.end(request),
        verbs.yielded(request),
        verbs.announce(request, NAMESPACE, tokens),
        verbs.wait(request, NAMESPACE, tokens, 100.0),
        verbs.open_sequence(NAMESPACE, tokens, request_or_none, ahead=random.randrange(3)),
        verbs.extend([sequence], [random.randrange(40)], [new], range(new)),
        verbs.fork_sequence(sequence, [request_or_none]),
        verbs.close_sequences([sequence]),
    ]
    return [*calls, verbs.step(random.sample(calls, 3)), *admin_calls(random, tokens)]


def admin_calls(random: Random, tokens: list[int]) -> list[verbs.Call[Any]]:
    return [
        verbs.status(),
        verbs.pages(),
        verbs.tree(),
        verbs.sessions(),
        verbs.audit(),
        verbs.explain(NAMESPACE, tokens),
        verbs.who_holds(random.randrange(33)),
        verbs.retained(),
        verbs.evict(random.randrange(4)),
        verbs.flush("m", random.randrange(2), salt=b""),
        verbs.raise_weights_version(random.randrange(9), "another-model"),
        verbs.retain_prompt(NAMESPACE, tokens, random.choice([None, 0.001])),
        verbs.release_prompt(random.randrange(9)),
        verbs.kill_session(random.randrange(9)),
    ]


def mutated(random: Random, frames: list[bytes]) -> list[bytes]:
    """The same frames with one to three faults."""
    frames = [bytes(frame) for frame in frames]
    for _ in range(random.choice([1, 1, 1, 2, 3])):
        at = random.randrange(len(frames))
        raw = bytearray(frames[at])
        cut = random.randrange(len(raw) + 1)
        match random.randrange(9):
            case 0 if raw:  # one byte
                raw[cut - 1] = random.randrange(256)
            case 1 if raw:  # one bit
                raw[cut - 1] ^= 1 << random.randrange(8)
            case 2:
                del raw[cut:]
            case 3:
                del raw[cut : cut + random.randrange(9)]
            case 4:  # one of msgpack's type bytes
                raw[cut:cut] = bytes([random.randrange(0xC0, 0xE0)])
            case 5:
                raw[cut:cut] = random.randbytes(random.randrange(9))
            case 6:
                raw[cut:cut] = raw[: random.randrange(64)]
            case 7:
                frames.insert(at, random.randbytes(random.randrange(20)))
                continue
            case _ if len(frames) > 1:
                frames.pop(at)
                continue
        frames[at] = bytes(raw)
    return frames


def fingerprint(cache: CacheManager) -> Any:
    """Everything that a refused request leaves alone. (Its demand for pages may stay queued.)"""
    return (
        cache.free_list.check().tolist(),
        [(n.id, n.tokens, n.refs, [(s.id, c) for s, c in n.holders.items()])
         for n in cache.tree.nodes()],
        [(s.id, dict(s.leased), dict(s.writing), dict(s.sealed), s.ended,
          [(q.handle, q.num_tokens, list(q.refs)) for q in s.sequences.values()])
         for s in cache.sessions.values()],
        [r.number for s in cache.sessions.values() for r in cache.queue.of_session(s)],
        (len(cache.handover), list(cache.operator.retained), cache.versions.minimums),
    )  # fmt: skip
