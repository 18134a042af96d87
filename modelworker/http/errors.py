"""How a refusal looks to an HTTP client: a status and OpenAI's error object."""

from __future__ import annotations

from typing import Any

from starlette.responses import JSONResponse

from kvd_shared.errors import BadRequest, KvdError, OverLimit
from modelworker.requests import QueueFull, RequestTooLong

RETRY_AFTER_S = 1


class InvalidField(BadRequest):
    """A field of the body is unknown, or its value is not supported. Details: `param`, its name."""

    code = "INVALID_FIELD"


class UnknownModel(KvdError):
    """The request names a model that this worker does not serve."""

    code = "MODEL_NOT_FOUND"


class BodyTooLarge(KvdError):
    """The body is over the size limit; it was not read to its end."""

    code = "BODY_TOO_LARGE"


class NotJsonContent(KvdError):
    """The content type is not JSON. A browser sends other types for any page, without asking."""

    code = "NOT_JSON_CONTENT"


_STATUS: tuple[tuple[type[KvdError], int, str], ...] = (
    (BadRequest, 400, "invalid_request_error"),
    (UnknownModel, 404, "invalid_request_error"),
    (RequestTooLong, 413, "invalid_request_error"),
    (OverLimit, 413, "invalid_request_error"),
    (BodyTooLarge, 413, "invalid_request_error"),
    (NotJsonContent, 415, "invalid_request_error"),
    (QueueFull, 429, "rate_limit_error"),
)


def error_object(error: KvdError) -> dict[str, Any]:
    """`{"error": …}`: the body of a refusal, and the event that ends a broken stream."""
    return _object(error.message, _status(error)[1], error.code, error.details.get("param"))


def error_response(error: KvdError) -> JSONResponse:
    """429 and 503 carry Retry-After: the same request can succeed later."""
    status, _ = _status(error)
    headers = {"retry-after": str(RETRY_AFTER_S)} if status in (429, 503) else None
    return JSONResponse(error_object(error), status, headers)


def plain_error_response(status: int, message: str) -> JSONResponse:
    """A refusal that no KvdError stands for: an unknown path, a wrong method, our own fault."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return JSONResponse(_object(message, kind, None, None), status)


def _status(error: KvdError) -> tuple[int, str]:
    for cls, status, kind in _STATUS:
        if isinstance(error, cls):
            return status, kind
    return (503, "service_unavailable_error") if error.retryable else (500, "server_error")


def _object(message: str, kind: str, code: str | None, param: str | None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
