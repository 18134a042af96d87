"""POST /v1/chat/completions: messages in, the assistant's next message out."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from modelworker.http.body import read_json_object
from modelworker.http.fields import Rule, integer, mapping, only, read_fields, refused, text
from modelworker.http.schema import read_body
from modelworker.http.service import Service

_ROLES = ("system", "developer", "user", "assistant")


async def chat_completions(request: Request) -> Response:
    service = Service.of(request)
    body = await read_json_object(request, service.options.max_body_bytes)
    options, messages = read_body(body, _RULES, "messages")
    service.check_model(options.model)
    prompt_ids = await asyncio.to_thread(service.served.tokenizer.encode_chat, messages)
    return await service.answer(
        request,
        [tuple(prompt_ids)],
        options,
        ChatShape(),
        id_prefix="chatcmpl-",
        default_max_tokens=None,
    )


class ChatShape:
    object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def whole(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def opening(self) -> dict[str, Any]:
        return {"delta": {"role": "assistant", "content": ""}}

    def delta(self, text: str) -> dict[str, Any]:
        return {"delta": {"content": text}}

    def closing(self) -> dict[str, Any]:
        return {"delta": {}}


def _messages(name: str, value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        raise refused(name, value, "an array of at least one message")
    return [_message(f"{name}[{i}]", message) for i, message in enumerate(value)]


def _message(name: str, value: Any) -> dict[str, Any]:
    message = read_fields(mapping(name, value), _MESSAGE_RULES, f"{name}.")
    for required in ("role", "content"):
        if required not in message:
            raise refused(f"{name}.{required}", None, "given")
    return {key: message[key] for key in ("role", "content", "name") if key in message}


def _role(name: str, value: Any) -> str:
    if value not in _ROLES:
        raise refused(name, value, " or ".join(_ROLES))
    return value


def _content(name: str, value: Any) -> str:
    """Text parts become one text, a line each: most templates take nothing else."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise refused(name, value, "a string or an array of text parts")
    parts = [_text_part(f"{name}[{i}]", part) for i, part in enumerate(value)]
    return "\n".join(parts)


def _text_part(name: str, value: Any) -> str:
    part = mapping(name, value)
    if part.get("type") != "text":  # before its fields: an image's would be called unknown
        raise refused(f"{name}.type", part.get("type"), '"text"')
    content = read_fields(part, {"type": only("text"), "text": _any_text}, f"{name}.").get("text")
    if content is None:
        raise refused(f"{name}.text", None, "a string")
    return content


def _any_text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise refused(name, value, "a string")
    return value


_MESSAGE_RULES: dict[str, Rule] = {
    "role": _role,
    "content": _content,
    "name": text(),
    # clients send an assistant's message back with all its fields
    "refusal": only(),
    "annotations": only([]),
    "audio": only(),
    "function_call": only(),
    "tool_calls": only([]),
}

_RULES: dict[str, Rule] = {
    "messages": _messages,
    "max_completion_tokens": integer(1, 2**31 - 1),
    "top_logprobs": only(0),
    "tools": only([]),
    "tool_choice": only("none"),
    "parallel_tool_calls": only(True),
    "functions": only([]),
    "function_call": only("none"),
    "modalities": only(["text"]),
    "store": only(False),
    "metadata": only({}),
    "service_tier": only("auto", "default"),
}
