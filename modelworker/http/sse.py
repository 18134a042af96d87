"""Server-sent events: a stream that ends with [DONE], with an error in it, or with its client."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from kvd_shared.errors import KvdError
from modelworker.http.disconnect import ClientGone, unless_disconnected
from modelworker.http.errors import error_object

_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",  # nginx would hold the events back
}


class EventStream(Response):
    """Sends each object as an event. A KvdError on the way becomes the last event before [DONE].

    `on_end` is called exactly once, however the stream ends.
    """

    def __init__(
        self, objects: AsyncIterator[dict[str, Any]], *, on_end: Callable[[], None]
    ) -> None:
        super().__init__(headers=_HEADERS)
        del self.headers["content-length"]
        self._objects = objects
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_disconnected(receive, self._write(send))
        except ClientGone:
            pass
        finally:
            self._on_end()

    async def _write(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        try:
            async for value in self._objects:
                await send(_part(json.dumps(value, ensure_ascii=False, separators=(",", ":"))))
        except KvdError as error:
            await send(_part(json.dumps(error_object(error))))
        await send(_part("[DONE]"))
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _part(data: str) -> dict[str, Any]:
    return {"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": True}
