"""The official client against a daemon and two workers, as its users meet them."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam

from tests.daemon import RunningDaemon, eventually, running_daemon
from tests.integration.http_client import Client
from tests.integration.tiny_world import PRINTABLE, Oracle, text_of, tokenizer
from tests.worker import RunningWorker, WorkerNursery

PAGE_SIZE = 8
NUM_PAGES = 120
MAX_MODEL_LEN = 500
HELLO: list[ChatCompletionMessageParam] = [{"role": "user", "content": "What-is-a-page?"}]
GREEDY: dict[str, Any] = {"model": "tiny", "temperature": 0}


@pytest.fixture(scope="module")
def host(
    nursery: WorkerNursery, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[RunningDaemon, list[RunningWorker]]]:
    tmp_path = tmp_path_factory.mktemp("openai")
    with running_daemon(tmp_path, model=folder, page_size=PAGE_SIZE, num_pages=NUM_PAGES) as daemon:
        options = ["--max-queued", "4", "--max-seqs", "2", "--max-model-len", str(MAX_MODEL_LEN)]
        workers = [nursery.start(daemon, *options, name=name) for name in ("left", "right")]
        yield daemon, workers
        daemon.check()
        for worker in workers:
            worker.close()


@pytest.fixture(scope="module")
def clients(host: tuple[RunningDaemon, list[RunningWorker]]) -> Iterator[list[openai.OpenAI]]:
    with ExitStack() as stack:
        made = [
            openai.OpenAI(base_url=f"{w.url}/v1", api_key="none", max_retries=0, timeout=60)
            for w in host[1]
        ]
        yield [stack.enter_context(client) for client in made]


@pytest.fixture
def client(clients: list[openai.OpenAI]) -> openai.OpenAI:
    return clients[0]


def prompt_of(length: int, seed: int) -> list[int]:
    return random.Random(seed).choices(PRINTABLE, k=length)


def chat_prompt(content: str) -> tuple[int, ...]:
    """The chat template, written out."""
    return tuple(tokenizer().encode(f"<s>[user] {content}\n[assistant] ").ids)


def cached_tokens(usage: Any) -> int:
    cached: int = usage.prompt_tokens_details.cached_tokens
    return cached


def test_a_completion_of_a_text(client: openai.OpenAI, oracle: Oracle) -> None:
    prompt = prompt_of(20, 1)
    answer = client.completions.create(prompt=text_of(prompt), max_tokens=12, **GREEDY)
    oracle.check(tuple(prompt), 12, answer.choices[0].text)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (20, 12)


def test_a_streamed_chat(client: openai.OpenAI, oracle: Oracle) -> None:
    chunks = list(
        client.chat.completions.create(
            messages=HELLO,
            max_completion_tokens=15,
            stream=True,
            stream_options={"include_usage": True},
            **GREEDY,
        )
    )
    text = "".join(c.choices[0].delta.content or "" for c in chunks[:-1])
    oracle.check(chat_prompt("What-is-a-page?"), 15, text)
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 15


def test_what_one_asked_is_cached_for_all(clients: list[openai.OpenAI]) -> None:
    """Nothing the first time; then all tokens but the last, here and in the other worker; of a
    longer prompt what it shares with the first; and nothing under a salt."""
    prompt = prompt_of(8 * PAGE_SIZE, 2)
    first, second = clients

    def cached(client: openai.OpenAI, prompt: list[int], **extra: Any) -> int:
        answer = client.completions.create(prompt=prompt, max_tokens=2, extra_body=extra, **GREEDY)
        return cached_tokens(answer.usage)

    assert cached(first, prompt) == 0
    assert cached(first, prompt) == 8 * PAGE_SIZE - 1
    assert cached(second, prompt) == 8 * PAGE_SIZE - 1
    assert cached(second, prompt + prompt_of(9, 3)) == 8 * PAGE_SIZE
    assert cached(second, prompt, cache_salt="another tenant") == 0
    assert cached(first, prompt, x_kvd={"no_cache": True}) == 0


def test_several_choices_of_one_prompt(client: openai.OpenAI, oracle: Oracle) -> None:
    """Greedy ones are equal; sampled ones differ, and a seed brings them back."""
    prompt = prompt_of(30, 4)
    answer = client.completions.create(prompt=prompt, n=3, max_tokens=10, **GREEDY)
    for choice in answer.choices:
        oracle.check(tuple(prompt), 10, choice.text)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (30, 30)

    def sampled() -> list[str]:
        answer = client.completions.create(
            model="tiny", prompt=prompt, n=3, max_tokens=10, temperature=1.2, seed=5
        )
        return [choice.text for choice in answer.choices]

    texts = sampled()
    assert len(set(texts)) == 3
    assert sampled() == texts


def test_a_stop_string(client: openai.OpenAI, oracle: Oracle) -> None:
    prompt = prompt_of(25, 6)
    expected = oracle.expected(tuple(prompt), 40).text
    stop = expected[10:13]
    answer = client.completions.create(prompt=prompt, max_tokens=40, stop=[stop, "\n"], **GREEDY)
    assert answer.choices[0].text == expected[: expected.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"


def test_refusals_leave_the_others_alone(client: openai.OpenAI, oracle: Oracle) -> None:
    """While a long answer is being written: an unknown field, an unknown model, a token that is
    none, a prompt that can never fit."""
    prompt = prompt_of(20, 7)
    going = client.completions.create(prompt=prompt, max_tokens=300, stream=True, **GREEDY)
    text = next(going).choices[0].text
    with pytest.raises(openai.BadRequestError, match="logit_bias"):
        client.completions.create(prompt=[5], logit_bias={"5": 1}, **GREEDY)
    with pytest.raises(openai.NotFoundError, match="'gpt-4' is not served here; 'tiny' is"):
        client.completions.create(model="gpt-4", prompt=[5])
    with pytest.raises(openai.BadRequestError, match="7000"):
        client.completions.create(prompt=[7000], **GREEDY)
    with pytest.raises(openai.APIStatusError, match=r"\b601\b.*\b500\b") as caught:
        client.completions.create(prompt=prompt_of(401, 8), max_tokens=200, **GREEDY)
    assert caught.value.status_code == 413
    text += "".join(chunk.choices[0].text for chunk in going)
    oracle.check(tuple(prompt), 300, text)


def test_more_than_may_wait_are_told_to_come_back(
    host: tuple[RunningDaemon, list[RunningWorker]], client: openai.OpenAI, oracle: Oracle
) -> None:
    """Two run, four wait, the seventh is refused; those that were accepted get their answers."""
    url = host[1][0].url
    prompts = [tuple(prompt_of(20, 10 + i)) for i in range(6)]
    lengths = [450, 450, 20, 20, 20, 20]
    answers = [""] * 6

    def ask(i: int) -> None:
        answers[i] = Client(url).complete(prompts[i], lengths[i]).text

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(6)]
    for thread in threads[:2]:
        thread.start()
    eventually(lambda: Client(url).health()["running"] == 2)
    for thread in threads[2:]:
        thread.start()
    eventually(lambda: Client(url).health()["waiting"] >= 4)
    with pytest.raises(openai.RateLimitError) as caught:
        client.completions.create(prompt=[5, 6], max_tokens=1, **GREEDY)
    assert caught.value.code == "QUEUE_FULL"
    assert int(caught.value.response.headers["retry-after"]) > 0
    for thread in threads:
        thread.join()
    for prompt, length, answer in zip(prompts, lengths, answers, strict=True):
        oracle.check(prompt, length, answer)
