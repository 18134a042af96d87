"""A model folder's tokenizer: text to token ids and back, and what ends a generation."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from kvd_shared.errors import BadRequest
from kvd_shared.model_folder import BadModelFolder
from modelworker.chat_template import ChatTemplate


class Tokenizer:
    """Thread-safe. Special tokens that open a prompt are those of tokenizer.json's post-processor.

    `eos_ids`: tokens that end a generation. `vocab_size`: every token id is below it.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        eos_ids: frozenset[int] = frozenset(),
        chat_template: ChatTemplate | None = None,
    ) -> None:
        # a tokenizer.json may carry the truncation and padding of its training; a prompt has none
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._chat_template = chat_template
        self._textless = frozenset(
            token_id
            for token_id, token in backend.get_added_tokens_decoder().items()
            if token.special
        )
        self.eos_ids = eos_ids
        self.vocab_size: int = max(backend.get_vocab().values(), default=-1) + 1

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer:
        """Reads tokenizer.json and, where they exist, the configuration files beside it.

        Raises BadModelFolder where tokenizer.json is missing or a file cannot be understood.
        """
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise BadModelFolder(f"{folder} has no tokenizer.json")
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            raise BadModelFolder(f"{path} is not a tokenizer: {error}") from error
        config = _read_json(folder / "tokenizer_config.json")
        special_tokens = _special_tokens(config)
        source = _template_source(folder, config)
        return cls(
            backend,
            eos_ids=_eos_ids(folder, backend, special_tokens.get("eos_token")),
            chat_template=None if source is None else ChatTemplate(source, special_tokens),
        )

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The token ids of a text; special tokens that are written out in it are recognised."""
        # encode_batch lets other Python threads run meanwhile, encode does not
        return self._backend.encode_batch([text], add_special_tokens=add_special_tokens)[0].ids

    def encode_chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """The prompt that asks the model for the next message.

        The template writes the special tokens itself, so none are added to its text. Raises
        BadRequest where the model has no template or the template refuses the messages.
        """
        if self._chat_template is None:
            raise BadRequest(
                "this model has no chat template (neither chat_template.jinja nor the key in "
                "tokenizer_config.json); use /v1/completions"
            )
        return self.encode(self._chat_template.render(messages), add_special_tokens=False)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of the tokens, without special ones."""
        return self._backend.decode(token_ids, skip_special_tokens=True)

    def has_text(self, token_id: int) -> bool:
        """False for special tokens and for ids that the vocabulary lacks (padded embeddings)."""
        return token_id not in self._textless and self._backend.id_to_token(token_id) is not None


def _read_json(path: Path) -> dict[str, Any]:
    """The object in the file; empty where there is no file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise BadModelFolder(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise BadModelFolder(f"{path} holds no JSON object")
    return content


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    """`bos_token`, `eos_token`, …: each is written as its text or as an object around it."""
    tokens = {}
    for name, value in config.items():
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str):
            tokens[name] = text
    return tokens


def _template_source(folder: Path, config: dict[str, Any]) -> str | None:
    """A file of its own wins over the key; of several named templates the default one is used."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template}
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise BadModelFolder(f"{folder}: chat_template in tokenizer_config.json is not a text")
    return template


def _eos_ids(folder: Path, backend: tokenizers.Tokenizer, eos_token: str | None) -> frozenset[int]:
    """What generation_config.json says, else config.json, and the tokenizer's own eos token."""
    declared = _read_json(folder / "generation_config.json").get("eos_token_id")
    if declared is None:
        declared = _read_json(folder / "config.json").get("eos_token_id")
    ids = set(declared if isinstance(declared, list) else [] if declared is None else [declared])
    if not all(type(token_id) is int for token_id in ids):
        raise BadModelFolder(f"{folder}: eos_token_id is {declared!r}, not token ids")
    own = None if eos_token is None else backend.token_to_id(eos_token)
    return frozenset(ids if own is None else ids | {own})
