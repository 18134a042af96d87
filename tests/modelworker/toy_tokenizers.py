"""Small tokenizers of the kinds that models come with, made on the spot."""

from __future__ import annotations

import json
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from modelworker.tokenizer import Tokenizer

TEXTS = [
    "the cat sat on the mat and the dog ate the hat",
    "über naïve Größe, señor; 你好世界 — 😀 x ≤ y",
    "stop at the end. END OF TEXT",
]
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "[{{ message.role }}] {{ message.content }}\n"
    "{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
)


def byte_level() -> tokenizers.Tokenizer:
    """A byte-level BPE that opens every prompt with <s>, as Llama 3 does."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return tokenizer


def sentencepiece_like() -> tokenizers.Tokenizer:
    """A BPE with ▁ for spaces and bytes for unknown characters, as Llama 2 has."""
    characters = sorted({*"".join(TEXTS[::2]), "▁"} - {" "})
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *characters]
    vocab = {name: index for index, name in enumerate([*names, "▁t", "th", "▁th", "he"])}
    merges = [("▁", "t"), ("t", "h"), ("▁t", "h"), ("h", "e")]
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


def folder(path: Path, **files: object) -> Path:
    """A model folder: tokenizer.json and the given JSON files, by their names without .json."""
    byte_level().save(str(path / "tokenizer.json"))
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return path


def chatty(path: Path) -> Tokenizer:
    """The byte-level tokenizer with a chat template."""
    config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": TEMPLATE}
    return Tokenizer.from_folder(folder(path, tokenizer_config=config))
