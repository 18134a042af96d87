"""The pieces of a sequence's text against its decoding in one go."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from modelworker.detokenize import IncrementalText
from modelworker.tokenizer import Tokenizer
from tests.modelworker import toy_tokenizers

BACKEND = toy_tokenizers.byte_level()
BYTES = Tokenizer(BACKEND)
# one token a byte: the hardest thing to put together again
SINGLE_BYTES = [BACKEND.get_vocab()[name] for name in pre_tokenizers.ByteLevel.alphabet()]
INVALID_BYTE = BACKEND.get_vocab()["Ģ"]  # 0x80: no character begins so
PIECES = Tokenizer(toy_tokenizers.sentencepiece_like())


def cut_at_first_stop(text: str, stop: tuple[str, ...]) -> tuple[str, bool]:
    """The stop that is complete first ends the text; of two, the longer."""
    for end in range(1, len(text) + 1):
        found = [len(s) for s in stop if text.endswith(s, 0, end)]
        if found:
            return text[: end - max(found)], True
    return text, False


def in_pieces(
    tokenizer: Tokenizer, ids: list[int], cuts: list[int], stop: tuple[str, ...] = ()
) -> tuple[str, bool]:
    incremental = IncrementalText(tokenizer, stop)
    bounds = sorted({0, len(ids), *(cut % (len(ids) + 1) for cut in cuts)})
    pieces = [incremental.push(ids[a:b]) for a, b in pairwise(bounds)]
    return "".join(pieces) + incremental.flush(), incremental.stopped


token_ids = st.lists(st.integers(0, BYTES.vocab_size + 2), max_size=60)
cuts = st.lists(st.integers(0, 60), max_size=8)
stops = st.lists(st.text("ab the", min_size=1, max_size=4), max_size=3).map(tuple)


@settings(deadline=None)
@given(token_ids, cuts)
def test_any_tokens_even_invalid_utf8_give_the_whole_decoding(
    ids: list[int], cuts: list[int]
) -> None:
    assert in_pieces(BYTES, ids, cuts) == (BYTES.decode(ids), False)


@settings(deadline=None)
@given(st.lists(st.sampled_from(SINGLE_BYTES), max_size=60), cuts)
def test_single_bytes_in_any_order(ids: list[int], cuts: list[int]) -> None:
    assert in_pieces(BYTES, ids, cuts) == (BYTES.decode(ids), False)


@settings(deadline=None)
@given(st.text("abthe 你é😀", max_size=60), cuts, stops)
@pytest.mark.parametrize("tokenizer", [BYTES, PIECES], ids=["bytes", "pieces"])
def test_text_is_cut_at_the_stop_that_is_complete_first(
    tokenizer: Tokenizer, text: str, cuts: list[int], stop: tuple[str, ...]
) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert in_pieces(tokenizer, ids, cuts, stop) == cut_at_first_stop(tokenizer.decode(ids), stop)


@pytest.mark.parametrize("tokenizer", [BYTES, PIECES], ids=["bytes", "pieces"])
def test_the_replacement_character_itself_is_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a\ufffdé\ufffd", add_special_tokens=False)
    assert in_pieces(tokenizer, ids, list(range(60)))[0] == "a\ufffdé\ufffd"


def test_a_character_is_given_out_when_its_last_byte_came() -> None:
    ids = PIECES.encode("😀", add_special_tokens=False)
    text = IncrementalText(PIECES)
    assert [text.push([token_id]) for token_id in ids] == ["", "", "", "", "😀"]


def test_a_beginning_of_a_stop_is_held_until_it_is_none() -> None:
    the, dot = BYTES.encode("the", add_special_tokens=False), BYTES.encode(".")[1:]
    text = IncrementalText(BYTES, ("thee",))
    assert text.push(the) == ""
    assert text.push(dot) == "the."
    assert text.push(the) == ""
    assert text.flush() == "the"
    assert not text.stopped


def test_nothing_comes_after_a_stop() -> None:
    ids = BYTES.encode("the cat sat", add_special_tokens=False)
    text = IncrementalText(BYTES, (" c",))
    assert text.push(ids) == "the"
    assert text.stopped
    assert text.push(ids) == text.flush() == ""


def test_special_tokens_in_the_middle_take_no_space_away() -> None:
    the = PIECES.encode("the", add_special_tokens=False)
    special = PIECES.encode("</s>", add_special_tokens=False)[-1:]
    ids = [*the, *special * 20, *the]
    assert in_pieces(PIECES, ids, list(range(60)))[0] == PIECES.decode(ids) == "the the"


def test_the_cost_of_a_token_does_not_grow_with_the_text() -> None:
    """The longest window decoded: for text, for bytes that never make a character, for both."""
    longest = 0

    class Counting(Tokenizer):
        def decode(self, token_ids: object) -> str:
            nonlocal longest
            longest = max(longest, len(token_ids))  # type: ignore[arg-type]
            return super().decode(token_ids)  # type: ignore[arg-type]

    tokenizer = Counting(toy_tokenizers.byte_level())
    words = tokenizer.encode(" ".join(toy_tokenizers.TEXTS), add_special_tokens=False)
    invalid = [INVALID_BYTE] * 500
    for ids in (words * 10, invalid, words + invalid + words):
        assert in_pieces(tokenizer, ids, [])[0] == Tokenizer.decode(BYTES, ids)
    assert longest <= 24
