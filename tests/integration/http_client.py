"""A completions client on the standard library alone: cheap enough for thousands of requests."""

from __future__ import annotations

import http.client
import json
import socket
import struct
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit


class Refused(Exception):
    """The worker answered with an error object: `status` (200 inside a stream) and `code`."""

    def __init__(self, status: int, error: dict[str, Any]) -> None:
        super().__init__(f"{status} {error['code']}: {error['message']}")
        self.status = status
        self.code = error["code"]


@dataclass(frozen=True, slots=True)
class Answer:
    text: str
    finish_reason: str
    cached_tokens: int


class Client:
    """One connection, opened when it is needed. A connection that breaks raises OSError or
    HTTPException."""

    def __init__(self, url: str, timeout_s: float = 60.0) -> None:
        parts = urlsplit(url)
        assert parts.hostname is not None
        self._connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=timeout_s)

    def complete(self, prompt: tuple[int, ...], max_tokens: int, **options: Any) -> Answer:
        """The first choice of the whole answer. Greedy, unless the options say otherwise."""
        self.send(prompt, max_tokens, **options)
        answer = json.load(self._response())
        choice = answer["choices"][0]
        cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
        return Answer(choice["text"], choice["finish_reason"], cached)

    def stream(self, prompt: tuple[int, ...], max_tokens: int, **options: Any) -> Iterator[str]:
        """The pieces as they come; closing the iterator early hangs up."""
        whole = False
        try:
            self.send(prompt, max_tokens, stream=True, **options)
            for event in _events(self._response()):
                if "error" in event:
                    raise Refused(200, event["error"])
                yield event["choices"][0]["text"]
            whole = True
        finally:
            if not whole:
                self.hang_up()

    def health(self) -> dict[str, Any]:
        self._connection.request("GET", "/health")
        health: dict[str, Any] = json.load(self._connection.getresponse())
        return health

    def hang_up(self) -> None:
        """Close with a reset, as a client that dies does."""
        if self._connection.sock is not None:
            now = struct.pack("ii", 1, 0)
            self._connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, now)
        self.close()

    def close(self) -> None:
        self._connection.close()

    def send(self, prompt: tuple[int, ...], max_tokens: int, **options: Any) -> None:
        """Ask, without waiting for anything."""
        asked = {"model": "tiny", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
        self._connection.request(
            "POST",
            "/v1/completions",
            json.dumps(asked | options),
            {"content-type": "application/json"},
        )

    def _response(self) -> http.client.HTTPResponse:
        response = self._connection.getresponse()
        if response.status != 200:
            raise Refused(response.status, json.load(response)["error"])
        return response


def _events(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    """Server-sent events up to [DONE]."""
    with closing(response):
        for line in response:
            data = line.decode().removeprefix("data: ").strip()
            if data == "[DONE]":
                response.read()  # the connection can be used again
                return
            if data:
                yield json.loads(data)
    raise ConnectionError("the stream ended without [DONE]")
