"""The answer to a generation request, whole or as a stream of chunks."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from modelworker.http.disconnect import ClientGone, unless_disconnected
from modelworker.http.generation import Generation
from modelworker.http.sse import EventStream
from modelworker.requests import Delta, FinishReason


class Shape(Protocol):
    """How one endpoint writes its choices. `object` and `chunk_object` are OpenAI's type names."""

    object: str
    chunk_object: str

    def whole(self, text: str) -> dict[str, Any]: ...

    def opening(self) -> dict[str, Any] | None:
        """The chunk that goes before a choice's text, if any."""
        ...

    def delta(self, text: str) -> dict[str, Any]: ...

    def closing(self) -> dict[str, Any]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """`generation` has been started; answering closes it."""

    id: str
    created: int
    model: str
    num_choices: int
    include_usage: bool
    shape: Shape
    generation: Generation

    async def respond(self, request: Request, *, stream: bool) -> Response:
        if stream:
            return EventStream(self._chunks(), on_end=self.generation.close)
        try:
            return JSONResponse(await unless_disconnected(request.receive, self._whole()))
        except ClientGone:
            return Response(status_code=499)  # for logs; nobody reads it
        finally:
            self.generation.close()

    async def _whole(self) -> dict[str, Any]:
        texts: list[list[str]] = [[] for _ in range(self.num_choices)]
        reasons: dict[int, FinishReason] = {}
        async for index, event in self.generation.events():
            if isinstance(event, Delta):
                texts[index].append(event.text)
            else:
                reasons[index] = event.reason
        choices = [
            self._choice(i, self.shape.whole("".join(text)), reasons[i])
            for i, text in enumerate(texts)
        ]
        return self._envelope(self.shape.object, choices, usage=self._usage())

    async def _chunks(self) -> AsyncIterator[dict[str, Any]]:
        opening = self.shape.opening()
        if opening is not None:
            for index in range(self.num_choices):
                yield self._chunk(index, opening)
        async for index, event in self.generation.events():
            if not isinstance(event, Delta):
                yield self._chunk(index, self.shape.closing(), event.reason)
            elif event.text:
                yield self._chunk(index, self.shape.delta(event.text))
        if self.include_usage:
            yield self._envelope(self.shape.chunk_object, [], usage=self._usage())

    def _chunk(
        self, index: int, part: dict[str, Any], reason: FinishReason | None = None
    ) -> dict[str, Any]:
        choices = [self._choice(index, part, reason)]
        extra = {"usage": None} if self.include_usage else {}
        return self._envelope(self.shape.chunk_object, choices, **extra)

    def _envelope(self, kind: str, choices: list[dict[str, Any]], **extra: Any) -> dict[str, Any]:
        head = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        return {**head, "choices": choices, **extra}

    def _choice(
        self, index: int, part: dict[str, Any], reason: FinishReason | None
    ) -> dict[str, Any]:
        return {"index": index, **part, "logprobs": None, "finish_reason": reason}

    def _usage(self) -> dict[str, Any]:
        prompt, completion = self.generation.prompt_tokens, self.generation.completion_tokens
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": self.generation.cached_tokens},
        }
