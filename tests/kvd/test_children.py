"""The child whose page is most like a given one, against looking at each."""

from __future__ import annotations

import random

import pytest

from kvd.cache import NO_OPTIONS
from kvd.children import FEW, Children
from kvd.node import Node, Root
from kvd.radix_tree import RadixTree
from kvd_shared.namespace import Namespace
from kvd_shared.refs import TOKEN_BYTES

PAGE_SIZE = 6
FANOUTS = [0, 1, 2, FEW - 1, FEW, FEW + 1, 3 * FEW, 200, 2000]


def a_node() -> Node:
    tenant = RadixTree(1, PAGE_SIZE, NO_OPTIONS).eviction.tenants[0]
    return Node(Root(Namespace(model="m"), tenant), None, bytearray(), bytearray(), 0)


def a_page(rng: random.Random, num_values: int) -> bytes:
    """Values that differ in their lowest or only in their highest byte, which come in different
    orders as bytes and as numbers."""
    values = [(i << 24 | (255 - i // 2)).to_bytes(TOKEN_BYTES, "little") for i in range(num_values)]
    return b"".join(rng.choices(values, k=PAGE_SIZE))


def common_tokens(one: bytes, other: bytes) -> int:
    same = 0
    while one[: (same + 1) * TOKEN_BYTES] == other[: (same + 1) * TOKEN_BYTES]:
        same += 1
        if same * TOKEN_BYTES >= min(len(one), len(other)):
            break
    return same


def filled(rng: random.Random, fanout: int, num_values: int) -> Children:
    children = Children()
    while len(children) < fanout:
        children.add(a_page(rng, num_values), a_node())
    return children


@pytest.mark.parametrize("fanout", FANOUTS)
def test_the_nearest_child_is_the_one_that_looking_at_each_finds(fanout: int) -> None:
    rng = random.Random(fanout)
    children = filled(rng, fanout, 5)
    for _ in range(60):
        if fanout and rng.random() < 0.5:  # one goes, another one comes
            children.remove(rng.choice(list(children)))
            children.add(a_page(rng, 5), a_node())
        usable = {key for key in children if rng.random() < rng.choice([0.05, 0.5, 1.0])}
        nodes = {children[key] for key in usable}
        wanted = a_page(rng, 5)[: rng.randint(1, PAGE_SIZE) * TOKEN_BYTES]
        found = children.nearest(wanted, nodes.__contains__)
        best = max((common_tokens(key, wanted) for key in usable), default=0)
        if not best:
            assert found is None
            continue
        assert found is not None
        key = next(key for key, child in children.items() if child is found[0])
        assert found[1] == best == common_tokens(key, wanted) and key in usable


def test_children_that_come_and_go_stay_in_order_while_they_are_many() -> None:
    rng = random.Random(1)
    children = Children()
    for _ in range(2000):
        key = a_page(rng, 2)
        if key in children and rng.random() < 0.6:
            children.remove(key)
        else:
            children.add(key, a_node())
        if len(children) > FEW:
            assert children.order is not None
        if children.order is not None:
            assert list(children.order) == sorted(children.keys() | children.garbage)
            assert not children.garbage & children.keys()


def test_a_child_in_the_place_of_another_is_found_instead_of_it() -> None:
    rng = random.Random(2)
    children = filled(rng, 2 * FEW, 4)
    for key in list(children):
        other = a_node()
        children.add(key, other)
        assert children[key] is other
        assert children.nearest(key, lambda n: True) == (other, PAGE_SIZE)
    assert len(children) == 2 * FEW
