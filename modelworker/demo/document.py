"""The reader's text: what of it fits the model, and questions whose answers it contains."""

from __future__ import annotations

import re
from dataclasses import dataclass

from modelworker.tokenizer import Tokenizer

QUOTE = "<|quote|>"  # the shipped model continues what follows it as the document does
CUE_WORDS = 6
ANSWER_TOKENS = 24
MIN_ANSWER_CHARACTERS = 16


@dataclass(frozen=True, slots=True)
class Question:
    """The first words of a sentence, and how the document goes on."""

    cue: str
    answer: str


def clean(text: str) -> str:
    """One paragraph: the model reads words, not the layout of a page."""
    return " ".join(text.split())


def fitting(text: str, tokenizer: Tokenizer, max_tokens: int) -> str:
    """The longest beginning of the text, in whole words, of at most so many tokens."""
    words = text.split(" ")
    low, high = 0, len(words)
    while low < high:
        middle = (low + high + 1) // 2
        if len(tokenizer.encode(" ".join(words[:middle]))) <= max_tokens:
            low = middle
        else:
            high = middle - 1
    return " ".join(words[:low])


def questions(text: str) -> list[Question]:
    """One for each sentence whose first words occur once and that is long enough to quote."""
    found = []
    for match in re.finditer(r"(?:^|(?<=[.!?] ))\S[^.!?]*[.!?]", text):
        words = match.group().split(" ")
        cue, rest = " ".join(words[:CUE_WORDS]), " ".join(words[CUE_WORDS:])
        if len(rest) >= MIN_ANSWER_CHARACTERS and text.count(cue) == 1:
            found.append(Question(f" {cue}", f" {rest}"))
    return found
