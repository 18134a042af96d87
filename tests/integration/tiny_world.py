"""A tiny random model whose every token is one printable character, and what it must answer."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers

from modelworker.dense import DenseSequence
from modelworker.model import load_model
from tests.modelworker import tiny_models, toy_tokenizers

NEAR_TIE = 1e-4  # of the logits' range: which of two such tokens is better is a matter of rounding
SPECIALS = ["<s>", "</s>"]
FIRST, LAST = ord("!"), ord("~")
PRINTABLE = range(len(SPECIALS), len(SPECIALS) + LAST - FIRST + 1)  # token ids


def tokenizer() -> tokenizers.Tokenizer:
    """Bytes, without merges: printable characters come first."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*SPECIALS, *alphabet])}
    made = tokenizers.Tokenizer(models.BPE(vocab, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(SPECIALS)
    return made


def make_folder(folder: Path, *, shards: bool = False) -> Path:
    """The model folder. Greedy answers are printable, so text and tokens tell the same."""
    made = tokenizer()
    made.save(str(folder / "tokenizer.json"))
    model = tiny_models.make("llama-gqa", vocab_size=made.get_vocab_size())
    with torch.no_grad():
        for token in set(range(made.get_vocab_size())) - set(PRINTABLE):
            model.lm_head.weight[token] = 0.0
    tiny_models.save(model, folder, shards=shards)
    config = {"bos_token": "<s>", "eos_token": None, "chat_template": toy_tokenizers.TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def text_of(token_ids: list[int]) -> str:
    return "".join(chr(token - PRINTABLE.start + FIRST) for token in token_ids)


@dataclass(frozen=True, slots=True)
class Expected:
    """A greedy answer, and by how much each of its tokens was better than the second best, as a
    share of the logits' range."""

    tokens: tuple[int, ...]
    text: str
    margins: list[float]


class Oracle:
    """What a worker without cache, pages or company answers: the dense path, token by token."""

    def __init__(self, folder: Path) -> None:
        self._model = load_model(folder, torch.float32)
        self.near_ties = 0
        self.expected = lru_cache(maxsize=None)(self._compute)

    def _compute(self, prompt: tuple[int, ...], num_tokens: int) -> Expected:
        sequence = DenseSequence(self._model)
        new, tokens, margins = list(prompt), list[int](), list[float]()
        for _ in range(num_tokens):
            logits = sequence.append(new)
            best, second = logits.topk(2).values.tolist()
            margins.append((best - second) / float(logits.max() - logits.min()))
            new = [int(logits.argmax())]
            tokens += new
        return Expected(tuple(tokens), text_of(tokens), margins)

    def check(self, prompt: tuple[int, ...], num_tokens: int, answer: str) -> None:
        """Asserts that the answer is the greedy one; a near-tie may part them, and is counted."""
        expected = self.expected(prompt, num_tokens)
        if answer == expected.text:
            return
        pairs = zip(answer, expected.text, strict=False)
        same = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
        assert same is not None and len(answer) == len(expected.text), (answer, expected.text)
        assert expected.margins[same] < NEAR_TIE, (
            f"{answer!r} is not {expected.text!r}: they part at {same}, where the best token led "
            f"by {expected.margins[same]:.1e} of the range"
        )
        self.near_ties += 1
