"""What pages say depends on all that it must depend on."""

from __future__ import annotations

import numpy as np

from tests.chaos.content import NAMESPACES, Path, Universe, slot_words


def test_every_slot_depends_on_all_tokens_up_to_it() -> None:
    tokens = np.arange(100, dtype=np.int32)
    words = slot_words(NAMESPACES[0], tokens)
    for changed in (0, 40, 99):
        other = tokens.copy()
        other[changed] += 1
        same = (slot_words(NAMESPACES[0], other) == words).all(axis=1)
        assert same[:changed].all() and not same[changed:].any()


def test_order_and_namespace_matter() -> None:
    tokens = np.array([1, 2, 3, 4], dtype=np.int32)
    words = slot_words(NAMESPACES[0], tokens)
    swapped = slot_words(NAMESPACES[0], tokens[[1, 0, 2, 3]])
    assert not (words == swapped).any()
    assert not (words == slot_words(NAMESPACES[1], tokens)).any()


def test_a_slot_is_never_the_memory_of_a_new_pool() -> None:
    words = slot_words(NAMESPACES[0], np.zeros(64, dtype=np.int32))
    assert words.all() and len(np.unique(words)) == words.size


def test_branches_share_exactly_what_is_before_the_fork() -> None:
    universe = Universe(5)
    for path in universe.paths():
        at = universe.fork_at(path)
        stem, branch = universe.tokens(path), universe.tokens(Path(path.doc, path.suffix, 1))
        assert (stem[:at] == branch[:at]).all()
        assert universe.prompt_length(path) < at < min(len(stem), len(branch))
        assert (
            universe.words(path)[:at] == universe.words(Path(path.doc, path.suffix, 1))[:at]
        ).all()
        assert Path.of(path.number) == path
