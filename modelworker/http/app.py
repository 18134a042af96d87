"""The routes, and what happens to errors."""

from __future__ import annotations

from typing import Any, cast

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from kvd_shared.errors import KvdError
from modelworker.http.chat import chat_completions
from modelworker.http.completions import completions
from modelworker.http.errors import error_response, plain_error_response
from modelworker.http.request_id import HEADER, RequestIds
from modelworker.http.service import HttpOptions, ServedModel, Service
from modelworker.requests import Engine

_OWNER = "kvd"


def create_app(
    engine: Engine, served: ServedModel, options: HttpOptions | None = None
) -> Starlette:
    """The API of one worker. It holds no state of its own; the engine outlives it."""
    app = Starlette(
        routes=[
            Route("/v1/completions", completions, methods=["POST"]),
            Route("/v1/chat/completions", chat_completions, methods=["POST"]),
            Route("/v1/models", _models),
            Route("/v1/models/{model_id:path}", _model),
            Route("/health", _health),
        ],
        middleware=[Middleware(RequestIds)],
        exception_handlers={
            KvdError: _refusal,
            HTTPException: _http_refusal,
            Exception: _internal_error,
        },
    )
    app.state.service = Service(engine, served, options or HttpOptions())
    return app


async def _models(request: Request) -> Response:
    return JSONResponse({"object": "list", "data": [_model_object(Service.of(request).served)]})


async def _model(request: Request) -> Response:
    service = Service.of(request)
    service.check_model(request.path_params["model_id"])
    return JSONResponse(_model_object(service.served))


async def _health(request: Request) -> Response:
    health = Service.of(request).engine.health()
    # while kvd is away for a moment, requests are taken as ever
    return JSONResponse(health, 200 if health["status"] in ("ok", "away") else 503)


def _model_object(served: ServedModel) -> dict[str, Any]:
    return {
        "id": served.id,
        "object": "model",
        "created": served.created,
        "owned_by": _OWNER,
        "max_model_len": served.context_len,
    }


def _refusal(request: Request, error: Exception) -> Response:
    return error_response(cast(KvdError, error))


def _http_refusal(request: Request, error: Exception) -> Response:
    refusal = cast(HTTPException, error)
    message = f"{request.method} {request.url.path}: {refusal.detail}"
    response = plain_error_response(refusal.status_code, message)
    response.headers.update(refusal.headers or {})
    return response


def _internal_error(request: Request, error: Exception) -> Response:
    # the traceback goes to the server's log; the client learns nothing of our inside
    response = plain_error_response(500, "internal error")
    response.headers[HEADER] = request.state.request_id
    return response
