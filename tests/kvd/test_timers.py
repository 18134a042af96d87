"""Nodes in the order in which time does something to them, against a plain dict."""

from __future__ import annotations

import random

import pytest

from kvd.cache import NO_OPTIONS
from kvd.node import NEVER, Node, Root
from kvd.radix_tree import RadixTree
from kvd.timers import Timers
from kvd_shared.namespace import Namespace


def some_nodes(count: int) -> list[Node]:
    tenant = RadixTree(1, 4, NO_OPTIONS).eviction.tenants[0]
    root = Root(Namespace(model="m"), tenant)
    return [Node(root, None, bytearray(), bytearray(), 0) for _ in range(count)]


@pytest.mark.parametrize("seed", range(5))
def test_each_node_comes_once_at_the_earliest_time_that_was_set(seed: int) -> None:
    rng, timers = random.Random(seed), Timers()
    nodes, due = some_nodes(8), dict[Node, float]()
    for _ in range(500):
        node, now = rng.choice(nodes), float(rng.randint(0, 20))
        assert timers.is_due(now) == (min(due.values(), default=NEVER) <= now)
        action = rng.choice(["set", "set", "discard", "pop"])
        if action == "set":
            timers.set(node, now)
            due[node] = min(now, due.get(node, NEVER))
        elif action == "discard":
            timers.discard(node)
            due.pop(node, None)
        elif due:
            first = timers.pop()
            assert due.pop(first) <= min(due.values(), default=NEVER) and first.timer_s == NEVER
        assert len(timers) == len(due)
        assert all(one.timer_s == due.get(one, NEVER) for one in nodes)


def test_never_is_no_time() -> None:
    timers, (node,) = Timers(), some_nodes(1)
    timers.set(node, NEVER)
    assert len(timers) == 0 and not timers.is_due(1e300)
