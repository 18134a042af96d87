"""The official client gets what it expects, from completions to exception classes."""

from __future__ import annotations

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam

from kvd_shared.errors import DaemonUnreachable, KvdError, OverLimit
from modelworker.requests import QueueFull, RequestTooLong
from modelworker.tokenizer import Tokenizer
from tests.modelworker.http.fake_engine import TEXT, FakeEngine

HELLO: list[ChatCompletionMessageParam] = [{"role": "user", "content": "the cat"}]


def test_a_completion(client: openai.OpenAI, engine: FakeEngine, tokenizer: Tokenizer) -> None:
    answer = client.completions.create(model="org/toy", prompt="the cat", max_tokens=200)
    (choice,) = answer.choices
    assert (choice.text, choice.finish_reason, choice.index) == (f"0 {TEXT}", "stop", 0)
    prompt = tokenizer.encode("the cat")
    assert engine.requests[0].prompt_ids == tuple(prompt)
    assert answer.id.startswith("cmpl-")
    usage = answer.usage
    assert usage is not None
    assert usage.prompt_tokens == len(prompt)
    assert usage.completion_tokens == len(tokenizer.encode(f"0 {TEXT}", add_special_tokens=False))
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.prompt_tokens_details is not None
    assert usage.prompt_tokens_details.cached_tokens == len(prompt) // 2
    assert engine.cancelled.empty()


def test_several_prompts_with_n_choices_each(
    client: openai.OpenAI, engine: FakeEngine, tokenizer: Tokenizer
) -> None:
    answer = client.completions.create(
        model="org/toy", prompt=["the cat", "the mat sat"], n=2, max_tokens=2
    )
    texts = [tokenizer.decode(tokenizer.encode(f"{i} {TEXT}")[1:3]) for i in (0, 1)]
    assert [(c.index, c.text) for c in answer.choices] == list(enumerate(texts * 2))
    assert {c.finish_reason for c in answer.choices} == {"length"}
    assert [r.n for r in engine.requests] == [2, 2]
    assert len({r.request_id for r in engine.requests}) == 2
    lengths = [len(r.prompt_ids) for r in engine.requests]
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == sum(lengths)
    assert answer.usage.completion_tokens == 8
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == sum(n // 2 for n in lengths)


@pytest.mark.parametrize("prompt", [[5, 6, 7], [[5, 6, 7]]])
def test_token_ids_are_taken_as_they_are(
    client: openai.OpenAI, engine: FakeEngine, prompt: list[int]
) -> None:
    client.completions.create(model="org/toy", prompt=prompt)
    assert [r.prompt_ids for r in engine.requests] == [(5, 6, 7)]


def test_stop(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="org/toy", messages=HELLO, stop=["好", " END"])
    assert answer.choices[0].message.content == "0 the cat sat on the mat 你"
    assert answer.choices[0].finish_reason == "stop"


def test_a_chat_prompt_is_the_templates(
    client: openai.OpenAI, engine: FakeEngine, tokenizer: Tokenizer
) -> None:
    parts: list[ChatCompletionMessageParam] = [
        {"role": "system", "content": [{"type": "text", "text": t} for t in ("be", "kind")]},
        *HELLO,
    ]
    answer = client.chat.completions.create(model="org/toy", messages=parts)
    assert answer.choices[0].message.role == "assistant"
    assert tokenizer.decode(engine.requests[0].prompt_ids) == (
        "[system] be\nkind\n[user] the cat\n[assistant] "
    )
    again = [*HELLO, answer.choices[0].message.model_dump()]
    client.chat.completions.create(model="org/toy", messages=again)  # type: ignore[arg-type]


def test_streaming_chat_with_usage(client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model="org/toy",
            messages=HELLO,
            n=2,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    texts, reasons = ["", ""], ["", ""]
    for chunk in chunks[:-1]:
        (choice,) = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        reasons[choice.index] += choice.finish_reason or ""
        assert chunk.usage is None
    assert texts == [f"0 {TEXT}", f"1 {TEXT}"]
    assert reasons == ["stop", "stop"]
    assert [c.choices[0].delta.role for c in chunks[:2]] == ["assistant", "assistant"]
    usage = chunks[-1].usage
    assert chunks[-1].choices == []
    assert usage is not None
    assert usage.prompt_tokens_details is not None
    assert usage.prompt_tokens_details.cached_tokens == usage.prompt_tokens // 2 > 0
    assert len({chunk.id for chunk in chunks}) == 1


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["org/toy"]
    assert client.models.retrieve("org/toy").created == 1
    with pytest.raises(openai.NotFoundError, match="org/other"):
        client.models.retrieve("org/other")


def test_a_wrong_model_is_not_found(client: openai.OpenAI, engine: FakeEngine) -> None:
    with pytest.raises(openai.NotFoundError, match="'gpt-4' is not served here; 'org/toy' is"):
        client.completions.create(model="gpt-4", prompt="a")
    assert engine.requests == []


def test_a_bad_option_is_a_bad_request(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="org/toy", prompt="a", frequency_penalty=1)
    assert caught.value.param == "frequency_penalty"


def test_more_than_the_context_is_too_long(client: openai.OpenAI, engine: FakeEngine) -> None:
    with pytest.raises(openai.APIStatusError, match=r"\b300\b.*\b256\b") as caught:
        client.completions.create(model="org/toy", prompt=[[5], [5] * 299], max_tokens=1)
    assert (caught.value.status_code, caught.value.code) == (413, "REQUEST_TOO_LONG")
    assert engine.requests == []


@pytest.mark.parametrize(
    ("refusal", "cls", "status"),
    [
        (RequestTooLong("900 pages of 800"), openai.APIStatusError, 413),
        (OverLimit("a prompt of 900 tokens"), openai.APIStatusError, 413),
        (QueueFull("256 requests wait"), openai.RateLimitError, 429),
        (DaemonUnreachable("no daemon"), openai.InternalServerError, 503),
        (KvdError("broken"), openai.InternalServerError, 500),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_the_engine_refuses(
    client: openai.OpenAI,
    engine: FakeEngine,
    refusal: KvdError,
    cls: type[openai.APIStatusError],
    status: int,
    stream: bool,
) -> None:
    """The second of two prompts is refused: the first one is taken back."""
    engine.refusal, engine.accept = refusal, 1
    engine.flowing.clear()
    with pytest.raises(cls, match=refusal.message) as caught:
        client.completions.create(model="org/toy", prompt=["a", "b"], stream=stream)
    assert (caught.value.status_code, caught.value.code) == (status, refusal.code)
    assert ("retry-after" in caught.value.response.headers) == (status in (429, 503))
    assert engine.cancelled.get(timeout=5) == engine.requests[0].request_id


def test_a_failure_on_the_way_of_a_whole_answer(client: openai.OpenAI, engine: FakeEngine) -> None:
    engine.failure = DaemonUnreachable("the daemon went away")
    with pytest.raises(openai.InternalServerError, match="went away") as caught:
        client.completions.create(model="org/toy", prompt="a")
    assert caught.value.status_code == 503


def test_a_failure_on_the_way_of_a_stream(client: openai.OpenAI, engine: FakeEngine) -> None:
    engine.failure = DaemonUnreachable("the daemon went away")
    with pytest.raises(openai.APIError, match="went away"):
        list(client.chat.completions.create(model="org/toy", messages=HELLO, stream=True))
