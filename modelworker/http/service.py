"""What every endpoint works with, and the way from checked prompts to an answer."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass, field
from typing import cast

from starlette.requests import Request
from starlette.responses import Response

from kvd_shared.errors import BadRequest
from modelworker.http.errors import UnknownModel
from modelworker.http.generation import Generation
from modelworker.http.reply import Reply, Shape
from modelworker.http.schema import Options
from modelworker.requests import Engine, RequestTooLong
from modelworker.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """The model as clients see it. `context_len`: most tokens of a prompt and its continuation."""

    id: str
    tokenizer: Tokenizer
    context_len: int
    created: int = field(default_factory=lambda: int(time.time()))


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpOptions:
    max_body_bytes: int = 16 * 2**20


@dataclass(frozen=True, slots=True)
class Service:
    engine: Engine
    served: ServedModel
    options: HttpOptions

    @classmethod
    def of(cls, request: Request) -> Service:
        return cast(Service, request.app.state.service)

    def check_model(self, name: str) -> None:
        """Raises UnknownModel where it is not the served one."""
        if name != self.served.id:
            raise UnknownModel(
                f"model {name!r} is not served here; {self.served.id!r} is", param="model"
            )

    async def answer(
        self,
        request: Request,
        prompts: list[tuple[int, ...]],
        options: Options,
        shape: Shape,
        *,
        id_prefix: str,
        default_max_tokens: int | None,
    ) -> Response:
        """Generates for all prompts or, where one is refused, for none.

        `default_max_tokens` None is what the context leaves.
        """
        answer_id = id_prefix + uuid.uuid4().hex
        requests = []
        for position, prompt_ids in enumerate(prompts):
            max_tokens = self._max_tokens(prompt_ids, options.max_tokens or default_max_tokens)
            requests.append(options.request(f"{answer_id}-{position}", prompt_ids, max_tokens))
        generation = Generation(self.engine, requests)
        generation.start()
        reply = Reply(
            id=answer_id,
            created=int(time.time()),
            model=self.served.id,
            num_choices=len(prompts) * options.n,
            include_usage=options.include_usage,
            shape=shape,
            generation=generation,
        )
        return await reply.respond(request, stream=options.stream)

    def _max_tokens(self, prompt_ids: tuple[int, ...], wanted: int | None) -> int:
        """Raises BadRequest for an empty prompt, RequestTooLong for more than the context."""
        if not prompt_ids:
            raise BadRequest("the prompt has no tokens")
        context_len = self.served.context_len
        max_tokens = max(1, context_len - len(prompt_ids)) if wanted is None else wanted
        if len(prompt_ids) + max_tokens > context_len:
            raise RequestTooLong(
                f"the prompt's {len(prompt_ids)} tokens and max_tokens {max_tokens} make "
                f"{len(prompt_ids) + max_tokens}, but the context is {context_len} tokens",
                wanted=len(prompt_ids) + max_tokens,
                limit=context_len,
            )
        return max_tokens
