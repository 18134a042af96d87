"""Bodies that are refused: the field, its value and what is supported are named, nothing starts."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.modelworker.http.fake_engine import FakeEngine

COMPLETION = {"model": "org/toy", "prompt": "the cat"}
CHAT = {"model": "org/toy", "messages": [{"role": "user", "content": "the cat"}]}


def post(http: httpx.Client, body: dict[str, Any]) -> httpx.Response:
    return http.post("/v1/chat/completions" if "messages" in body else "/v1/completions", json=body)


COMMON_REFUSALS = [
    ("temperature", 3, "temperature is 3, but must be a number from 0 to 2"),
    ("temperature", -0.1, "-0.1"),
    ("temperature", "1", 'temperature is "1", but must be a number'),
    ("temperature", True, "temperature is true, but must be a number"),
    ("top_p", 0, "top_p is 0, but must be a number above 0, up to 1"),
    ("top_p", 1.01, "1.01"),
    ("top_k", -2, "top_k is -2, but must be an integer from -1 to"),
    ("top_k", 1.0, "top_k is 1.0, but must be an integer"),
    ("seed", 2**63, "seed is 9223372036854775808"),
    ("n", 0, "n is 0, but must be an integer from 1 to 128"),
    ("n", 129, "129"),
    ("n", True, "n is true, but must be an integer"),
    ("max_tokens", 0, "max_tokens is 0"),
    ("stop", "", 'stop is "", but must be a string of 1 to'),
    ("stop", ["a", 1], "stop is 1"),
    ("stop", ["a"] * 17, "array of 17, but must be a string or an array of up to 16 strings"),
    ("stream", 1, "stream is 1, but must be true or false"),
    ("stream_options", {"include_usage": True}, "stream_options needs stream: true"),
    ("ignore_eos", "yes", "ignore_eos"),
    ("cache_salt", "", "cache_salt"),
    ("x_kvd", True, "x_kvd is true, but must be an object"),
    ("presence_penalty", 0.5, "presence_penalty is 0.5, but must be 0 or null; it is not impl"),
    ("presence_penalty", False, "presence_penalty is false"),
    ("logprobs", 0, "logprobs is 0, but must be false or null"),
    ("logit_bias", {"5": 1}, "logit_bias is an object, but must be {} or null"),
    ("repetition_penalty", 1.1, "repetition_penalty"),
    ("response_format", {"type": "json_object"}, 'must be {"type": "text"} or null'),
    ("user", 5, "user is 5, but must be a string"),
    ("tempurature", 1, '"tempurature" is no field of this request; did you mean temperature?'),
    ("\x1b[31mred", 1, r'"\u001b[31mred" is no field'),
]


@pytest.mark.parametrize("body", [COMPLETION, CHAT], ids=["completion", "chat"])
@pytest.mark.parametrize(("field", "value", "message"), COMMON_REFUSALS)
def test_common_fields(
    http: httpx.Client,
    engine: FakeEngine,
    body: dict[str, Any],
    field: str,
    value: Any,
    message: str,
) -> None:
    check_refused(post(http, {**body, field: value}), engine, field, message)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("prompt", None, "prompt is required"),
        ("prompt", [], "array of 0, but must be a string, an array of token ids"),
        ("prompt", [1, "a"], "array of 2"),
        ("prompt", [True], "array of 1"),
        ("prompt", [[1], []], "array of 2"),
        ("prompt", ["a"] * 129, "array of 129"),
        ("prompt", [5, 320], "prompt has token id 320, but the vocabulary ends at 319"),
        ("prompt", [5, -1], "array of 2"),
        ("model", None, "model is required"),
        ("model", ["org/toy"], "model is an array of 1, but must be a string"),
        ("echo", True, "echo is true, but must be false or null; it is not implemented"),
        ("best_of", 2, "best_of is 2, but must be 1 or null"),
        ("suffix", "end", 'suffix is "end", but must be "" or null'),
        ("max_completion_tokens", 5, "no field"),
    ],
)
def test_completion_fields(
    http: httpx.Client, engine: FakeEngine, field: str, value: Any, message: str
) -> None:
    check_refused(post(http, {**COMPLETION, field: value}), engine, field, message)


IMAGE = {"type": "image_url", "image_url": {"url": "x"}}


@pytest.mark.parametrize(
    ("message", "field", "error"),
    [
        ("hello", "messages[0]", 'messages[0] is "hello", but must be an object'),
        ({"content": "a"}, "messages[0].role", "messages[0].role is null, but must be given"),
        ({"role": "user"}, "messages[0].content", "must be given"),
        ({"role": "tool", "content": "a"}, "messages[0].role", "must be system or developer"),
        ({"role": "user", "content": 1}, "messages[0].content", "array of text parts"),
        ({"role": "user", "content": [IMAGE]}, "messages[0].content[0].type", "image_url"),
        ({"role": "user", "content": [{"type": "text"}]}, "messages[0].content[0].text", "null"),
        ({"role": "user", "content": "a", "tool_calls": [1]}, "messages[0].tool_calls", "not impl"),
        ({"role": "user", "contents": "a"}, "messages[0].contents", "mean messages[0].content?"),
    ],
)
def test_messages(
    http: httpx.Client, engine: FakeEngine, message: Any, field: str, error: str
) -> None:
    check_refused(post(http, {**CHAT, "messages": [message]}), engine, field, error)


@pytest.mark.parametrize(
    ("fields", "field", "message"),
    [
        ({"messages": []}, "messages", "at least one message"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens", "differ"),
        ({"tools": [{"type": "function"}]}, "tools", "array of 1, but must be [] or null"),
        ({"tool_choice": "auto"}, "tool_choice", 'must be "none" or null'),
        ({"logprobs": True}, "logprobs", "not implemented"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x", "no field"),
        ({"x_kvd": {"no_cash": True}}, "x_kvd.no_cash", "did you mean x_kvd.no_cache?"),
    ],
)
def test_chat_fields(
    http: httpx.Client, engine: FakeEngine, fields: dict[str, Any], field: str, message: str
) -> None:
    check_refused(post(http, {**CHAT, **fields}), engine, field, message)


def check_refused(response: httpx.Response, engine: FakeEngine, field: str, message: str) -> None:
    error = response.json()["error"]
    assert (response.status_code, error["type"]) == (400, "invalid_request_error")
    assert message in error["message"]
    assert (error["param"], error["code"]) == (field, "INVALID_FIELD")
    assert engine.requests == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not valid JSON"),
        (b"[]", "must be an object"),
        (b'{"temperature": NaN}', "NaN is no JSON number"),
        (b"[" * 10_000, "not valid JSON"),
        (b'{"n": ' + b"1" * 5_000 + b"}", "not valid JSON"),
        (b'{"prompt": "\xff"}', "not valid JSON"),
        (rb'{"prompt": "\uD800"}', "surrogates not allowed"),
    ],
)
def test_bodies_that_are_no_json_object(
    http: httpx.Client, engine: FakeEngine, content: bytes, message: str
) -> None:
    headers = {"content-type": "application/json"}
    response = http.post("/v1/completions", content=content, headers=headers)
    assert response.status_code == 400
    assert message in response.json()["error"]["message"]
    assert engine.requests == []


def test_what_a_request_may_say_reaches_the_engine(http: httpx.Client, engine: FakeEngine) -> None:
    body = {
        **COMPLETION,
        "max_tokens": 3,
        "temperature": 0,
        "top_p": 0.5,
        "top_k": -1,
        "seed": -5,
        "n": 2,
        "stop": ["x", "y"],
        "ignore_eos": True,
        "cache_salt": "größe",
        "x_kvd": {"no_cache": True},
        "user": "someone",
        "presence_penalty": 0.0,
        "logprobs": None,
        "logit_bias": {},
        "best_of": 1,
        "suffix": "",
        "repetition_penalty": 1.0,
        "response_format": {"type": "text"},
        "stream": None,
    }
    assert post(http, body).status_code == 200
    (request,) = engine.requests
    assert (request.n, request.salt, request.use_cache) == (2, "größe".encode(), False)
    params = request.params
    assert (params.max_tokens, params.temperature, params.top_p) == (3, 0.0, 0.5)
    assert (params.top_k, params.seed, params.stop, params.ignore_eos) == (0, -5, ("x", "y"), True)


def test_defaults(http: httpx.Client, engine: FakeEngine) -> None:
    assert post(http, COMPLETION).status_code == post(http, CHAT).status_code == 200
    completion, chat = engine.requests
    assert completion.params.max_tokens == 16
    assert chat.params.max_tokens == 256 - len(chat.prompt_ids)
    assert (completion.n, completion.salt, completion.use_cache) == (1, b"", True)
    assert (completion.params.temperature, completion.params.top_p) == (1.0, 1.0)
