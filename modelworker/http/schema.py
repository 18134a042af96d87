"""What a generation request may ask for besides its prompt, and what it gets by default."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from modelworker.http.errors import InvalidField
from modelworker.http.fields import (
    Rule,
    boolean,
    integer,
    mapping,
    number,
    only,
    read_fields,
    refused,
    text,
)
from modelworker.requests import GenerationRequest, SamplingParams

MAX_N = 128
MAX_STOPS = 16
_INT64 = 2**63
_INT32 = 2**31


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The checked options of one body; `max_tokens` None takes the endpoint's default.

    At most MAX_N continuations of a prompt, MAX_STOPS stop strings.
    """

    model: str
    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    n: int = 1
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    salt: bytes = b""
    use_cache: bool = True
    stream: bool = False
    include_usage: bool = False

    def request(
        self, request_id: str, prompt_ids: tuple[int, ...], max_tokens: int
    ) -> GenerationRequest:
        """What the engine is asked for one prompt."""
        params = SamplingParams(
            max_tokens=max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            seed=self.seed,
            stop=self.stop,
            ignore_eos=self.ignore_eos,
        )
        return GenerationRequest(
            request_id=request_id,
            prompt_ids=prompt_ids,
            params=params,
            n=self.n,
            salt=self.salt,
            use_cache=self.use_cache,
        )


def read_body(
    body: Mapping[str, Any], rules: Mapping[str, Rule], prompt_field: str
) -> tuple[Options, Any]:
    """The options, and what the rule of `prompt_field` made of it. Raises InvalidField."""
    given = read_fields(body, {**_COMMON, **rules})
    for required in ("model", prompt_field):
        if required not in given:
            raise InvalidField(f"{required} is required", param=required)
    if "stream_options" in given and not given.get("stream"):
        raise InvalidField("stream_options needs stream: true", param="stream_options")
    limits = {given[name] for name in ("max_tokens", "max_completion_tokens") if name in given}
    if len(limits) > 1:
        raise InvalidField(
            "max_tokens and max_completion_tokens differ; give one", param="max_tokens"
        )
    named = {_OPTION.get(name, name): value for name, value in given.items()}
    options = {field.name: named[field.name] for field in fields(Options) if field.name in named}
    return Options(**options), given[prompt_field]


def _top_k(name: str, value: Any) -> int:
    return max(0, integer(-1, _INT32 - 1)(name, value))  # -1 and 0 both keep every token


def _stop(name: str, value: Any) -> tuple[str, ...]:
    stops = value if isinstance(value, list) else [value]
    if len(stops) > MAX_STOPS:
        raise refused(name, value, f"a string or an array of up to {MAX_STOPS} strings")
    return tuple(text(least=1)(name, stop) for stop in stops)


def _include_usage(name: str, value: Any) -> bool:
    rules = {
        "include_usage": boolean,
        "include_obfuscation": only(False),
        "continuous_usage_stats": only(False),
    }
    return read_fields(mapping(name, value), rules, f"{name}.").get("include_usage", False)


def _use_cache(name: str, value: Any) -> bool:
    given = read_fields(mapping(name, value), {"no_cache": boolean}, f"{name}.")
    return not given.get("no_cache", False)


def _salt(name: str, value: Any) -> bytes:
    return text(least=1)(name, value).encode()


# fields whose values are held under another name in Options
_OPTION = {
    "max_completion_tokens": "max_tokens",
    "stream_options": "include_usage",
    "cache_salt": "salt",
    "x_kvd": "use_cache",
}

_COMMON: dict[str, Rule] = {
    "model": text(),
    "max_tokens": integer(1, _INT32 - 1),
    "temperature": number(0, 2),
    "top_p": number(0, 1, above=True),
    "top_k": _top_k,
    "seed": integer(-_INT64, _INT64 - 1),
    "n": integer(1, MAX_N),
    "stop": _stop,
    "stream": boolean,
    "stream_options": _include_usage,
    "ignore_eos": boolean,
    "cache_salt": _salt,
    "x_kvd": _use_cache,
    "user": text(),
    # not implemented: clients send them at the value that changes nothing
    "presence_penalty": only(0),
    "frequency_penalty": only(0),
    "repetition_penalty": only(1),
    "min_p": only(0),
    "min_tokens": only(0),
    "logit_bias": only({}),
    "logprobs": only(False),
    "stop_token_ids": only([]),
    "response_format": only({"type": "text"}),
}
