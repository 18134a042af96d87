"""The JSON object that a POST carries."""

from __future__ import annotations

import json
from typing import Any, NoReturn

from starlette.requests import ClientDisconnect, Request

from kvd_shared.errors import BadRequest
from modelworker.http.errors import BodyTooLarge, NotJsonContent


async def read_json_object(request: Request, max_bytes: int) -> dict[str, Any]:
    """Raises NotJsonContent, BodyTooLarge (before the rest is read) or BadRequest."""
    content_type = request.headers.get("content-type", "")
    if content_type.partition(";")[0].strip().lower() != "application/json":
        raise NotJsonContent(f"content-type is {content_type!r}, but must be application/json")
    body = bytearray()
    try:
        async for part in request.stream():
            body += part
            if len(body) > max_bytes:
                raise BodyTooLarge(f"the body is larger than the limit of {max_bytes} bytes")
    except ClientDisconnect:
        raise BadRequest("the client left before the body was complete") from None
    try:
        text = body.decode()
        value = json.loads(text, parse_constant=_refuse_constant)
        if "\\ud" in text.lower():
            json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair is no text
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"the body is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise BadRequest(f"the body is a JSON {type(value).__name__}, but must be an object")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")
