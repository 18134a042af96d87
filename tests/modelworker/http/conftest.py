"""One server on a loopback port a module, with a fresh-looking fake engine for every test."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import openai
import pytest

from modelworker.http.app import create_app
from modelworker.http.server import serve
from modelworker.http.service import HttpOptions, ServedModel
from modelworker.tokenizer import Tokenizer
from tests.modelworker.http.fake_engine import FakeEngine
from tests.modelworker.toy_tokenizers import chatty


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return chatty(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def _served(tokenizer: Tokenizer) -> Iterator[tuple[str, FakeEngine]]:
    engine = FakeEngine(tokenizer)
    served = ServedModel(id="org/toy", tokenizer=tokenizer, context_len=256, created=1)
    handle = serve(create_app(engine, served, HttpOptions(max_body_bytes=20_000)), port=0)
    yield handle.url, engine
    handle.stop()
    assert handle.wait(10)


@pytest.fixture
def engine(_served: tuple[str, FakeEngine]) -> FakeEngine:
    _served[1].reset()
    return _served[1]


@pytest.fixture
def url(_served: tuple[str, FakeEngine], engine: FakeEngine) -> str:
    return _served[0]


@pytest.fixture
def http(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=10) as client:
        yield client


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=10) as client:
        yield client
