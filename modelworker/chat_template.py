"""A model's chat template: messages in, the exact prompt text that the model was tuned on out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from kvd_shared.errors import BadRequest
from kvd_shared.model_folder import BadModelFolder


class ChatTemplate:
    """One compiled template. It came with the model's files, so it runs in a sandbox."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """`special_tokens` are the template's variables `bos_token`, `eos_token` and so on.

        Raises BadModelFolder where the template does not compile.
        """
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[jinja2.ext.loopcontrols, _GenerationBlock],
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise BadModelFolder(f"the chat template does not compile: {error}") from error
        self._special_tokens = dict(special_tokens)

    def render(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True
    ) -> str:
        """The prompt. Raises BadRequest where the template refuses the messages, with its words."""
        try:
            return self._template.render(
                **self._special_tokens,
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                tools=None,  # templates ask `is not none`, which an undefined name would pass
                documents=None,
            )
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise BadRequest(f"the model's chat template refuses the messages: {error}") from error


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's words for training; to a server it is its body."""

    tags = {"generation"}  # noqa: RUF012 - the base class declares it so

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(value: Any, **options: Any) -> str:
    # jinja's own filter escapes for HTML, which no model was tuned on
    return json.dumps(value, **{"ensure_ascii": False, **options})


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
