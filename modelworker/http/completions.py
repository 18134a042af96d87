"""POST /v1/completions: text or token ids in, text out."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from modelworker.http.body import read_json_object
from modelworker.http.errors import InvalidField
from modelworker.http.fields import Rule, only, refused
from modelworker.http.schema import read_body
from modelworker.http.service import Service
from modelworker.tokenizer import Tokenizer

MAX_PROMPTS = 128
DEFAULT_MAX_TOKENS = 16  # OpenAI's

Prompt = str | tuple[int, ...]


async def completions(request: Request) -> Response:
    service = Service.of(request)
    body = await read_json_object(request, service.options.max_body_bytes)
    options, prompts = read_body(body, _RULES, "prompt")
    service.check_model(options.model)
    return await service.answer(
        request,
        await asyncio.to_thread(_encode, service.served.tokenizer, prompts),
        options,
        CompletionShape(),
        id_prefix="cmpl-",
        default_max_tokens=DEFAULT_MAX_TOKENS,
    )


class CompletionShape:
    object = "text_completion"
    chunk_object = "text_completion"

    def whole(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def opening(self) -> None:
        return None

    def delta(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def closing(self) -> dict[str, Any]:
        return {"text": ""}


def _encode(tokenizer: Tokenizer, prompts: tuple[Prompt, ...]) -> list[tuple[int, ...]]:
    """Raises InvalidField for a token id that the vocabulary lacks."""
    encoded = [tuple(tokenizer.encode(p)) if isinstance(p, str) else p for p in prompts]
    highest = max((max(ids, default=0) for ids in encoded), default=0)
    if highest >= tokenizer.vocab_size:
        raise InvalidField(
            f"prompt has token id {highest}, but the vocabulary ends at {tokenizer.vocab_size - 1}",
            param="prompt",
        )
    return encoded


def _prompt(name: str, value: Any) -> tuple[Prompt, ...]:
    prompts = value if isinstance(value, list) and not _is_token_ids(value) else [value]
    if not 1 <= len(prompts) <= MAX_PROMPTS or not all(map(_is_prompt, prompts)):
        supported = f"a string, an array of token ids, or an array of 1 to {MAX_PROMPTS} of either"
        raise refused(name, value, supported)
    return tuple(p if isinstance(p, str) else tuple(p) for p in prompts)


def _is_prompt(value: Any) -> bool:
    return isinstance(value, str) or _is_token_ids(value)


def _is_token_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(i) is int and i >= 0 for i in value)


_RULES: dict[str, Rule] = {
    "prompt": _prompt,
    "echo": only(False),
    "suffix": only(""),
    "best_of": only(1),
}
