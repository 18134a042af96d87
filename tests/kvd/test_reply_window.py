"""The last answers of a session: what is kept, what is known of a number, and what never is."""

from __future__ import annotations

from contextlib import suppress
from random import Random

import pytest

from kvd.reply_window import WINDOW, WINDOW_BYTES, ReplyWindow
from kvd_shared.errors import ReplyGone


def test_no_number_is_new_twice() -> None:
    """However numbers are chosen, in any order: what was begun once is never begun again."""
    random, window, begun = Random(5), ReplyWindow(), dict[int, list[bytes]]()
    for _ in range(20_000):
        highest = random.choice([50, 500, 5_000, 1 << 40])
        seq = random.randrange(1, highest)
        if window.is_new(seq):
            assert seq not in begun
            begun[seq] = [random.randbytes(random.choice([1, 40, 9_000]))]
            if random.random() < 0.3:
                window.begun(seq, b"a")
                assert window.again(seq, b"b") is None
                assert window.ended(seq, begun[seq]) == b"b"
            else:
                window.done(seq, begun[seq])
            continue
        with suppress(ReplyGone):
            assert window.again(seq, b"c") is begun[seq]
        kept = [sum(map(len, a)) for a in window._answers if a is not None]
        assert sum(kept) == window._bytes <= WINDOW_BYTES
    assert not window.routes


def test_the_last_answers_are_kept_where_numbers_rise() -> None:
    window = ReplyWindow()
    for seq in range(1, 1_000):
        window.done(seq, [str(seq).encode()])
    for seq in range(1_000 - WINDOW, 1_000):
        assert window.again(seq, b"") == [str(seq).encode()]
    with pytest.raises(ReplyGone):
        window.again(999 - WINDOW, b"")
    assert not window.is_new(999 - WINDOW)


def test_answers_are_bounded_in_bytes_too() -> None:
    window, each = ReplyWindow(), WINDOW_BYTES // 8
    for seq in range(1, 21):
        window.done(seq, [bytes(each // 2), bytes(each // 2)])
    for seq in range(13, 21):
        assert window.again(seq, b"")
    for seq in range(1, 13):
        assert not window.is_new(seq)
        with pytest.raises(ReplyGone):
            window.again(seq, b"")
    window.done(21, [bytes(WINDOW_BYTES + 1)])  # one that is too long alone costs no other
    with pytest.raises(ReplyGone):
        window.again(21, b"")
    assert window.again(20, b"")


def test_one_that_is_overtaken_by_a_whole_ring_is_answered_all_the_same() -> None:
    window = ReplyWindow()
    window.begun(3, b"here")
    window.done(3 + WINDOW, [b"later"])
    assert window.again(3, b"there") is None
    assert window.ended(3, [b"slow"]) == b"there"
    assert window.again(3 + WINDOW, b"") == [b"later"]
    with pytest.raises(ReplyGone):
        window.again(3, b"")
