"""What is seen on the wire: events, ids, limits, health, and clients that leave."""

from __future__ import annotations

import json
import socket
import struct
import time
from urllib.parse import urlsplit

import httpx
import pytest
from starlette.testclient import TestClient

from kvd_shared.errors import DaemonUnreachable
from modelworker.http.app import create_app
from modelworker.http.server import CannotListen, serve
from modelworker.http.service import ServedModel
from modelworker.tokenizer import Tokenizer
from tests.modelworker.http.fake_engine import TEXT, FakeEngine
from tests.modelworker.toy_tokenizers import sentencepiece_like

BODY = {"model": "org/toy", "prompt": "the cat", "max_tokens": 100}


def test_a_stream_is_events_that_end_with_done(http: httpx.Client) -> None:
    response = http.post("/v1/completions", json={**BODY, "stream": True})
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    *events, done, end = response.text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == f"0 {TEXT}"
    assert all(chunk["choices"][0]["text"] for chunk in chunks[:-1])  # no half 😀, no empty chunk
    assert [c["choices"][0]["finish_reason"] for c in chunks][-2:] == [None, "stop"]
    assert all("usage" not in chunk for chunk in chunks)


def test_a_failure_is_the_last_event_before_done(http: httpx.Client, engine: FakeEngine) -> None:
    engine.failure = DaemonUnreachable("the daemon went away")
    *_, event, done, _ = http.post("/v1/completions", json={**BODY, "stream": True}).text.split(
        "\n\n"
    )
    error = json.loads(event.removeprefix("data: "))["error"]
    assert (error["code"], error["message"]) == ("DAEMON_UNREACHABLE", "the daemon went away")
    assert done == "data: [DONE]"


def test_request_ids(http: httpx.Client) -> None:
    given = http.get("/health", headers={"x-request-id": "trace-7"})
    assert given.headers["x-request-id"] == "trace-7"
    ours = [http.get(path).headers["x-request-id"] for path in ("/health", "/nothing")]
    assert len(set(ours)) == 2
    unfit = http.get("/health", headers={"x-request-id": "a b" * 100})
    assert len(unfit.headers["x-request-id"]) == 32


def test_one_client_id_twice_is_two_engine_requests(http: httpx.Client, engine: FakeEngine) -> None:
    for _ in range(2):
        http.post("/v1/completions", json=BODY, headers={"x-request-id": "same"})
    assert len({request.request_id for request in engine.requests}) == 2


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nothing", 404), ("GET", "/v1/completions", 405), ("POST", "/health", 405)],
)
def test_no_such_route(http: httpx.Client, method: str, path: str, status: int) -> None:
    response = http.request(method, path)
    assert response.status_code == status
    assert path in response.json()["error"]["message"]


def test_a_body_over_the_limit(http: httpx.Client, engine: FakeEngine) -> None:
    for content in (b" " * 20_001, iter([b" " * 1_000] * 30)):
        response = http.post(
            "/v1/completions", content=content, headers={"content-type": "application/json"}
        )
        assert response.status_code == 413
        assert "20000" in response.json()["error"]["message"]
    assert engine.requests == []


def test_only_json_is_taken(http: httpx.Client, engine: FakeEngine) -> None:
    body = json.dumps(BODY)
    response = http.post("/v1/completions", content=body, headers={"content-type": "text/plain"})
    assert response.status_code == 415
    headers = {"content-type": "Application/JSON; charset=utf-8"}
    assert http.post("/v1/completions", content=body, headers=headers).status_code == 200
    assert len(engine.requests) == 1


def test_health(http: httpx.Client, engine: FakeEngine) -> None:
    assert http.get("/health").json()["status"] == "ok"
    engine.status = "detached"
    response = http.get("/health")
    assert (response.status_code, response.json()["status"]) == (503, "detached")


def test_our_own_fault_names_no_inside(
    http: httpx.Client, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "submit", None)
    response = http.post("/v1/completions", json=BODY, headers={"x-request-id": "trace-8"})
    assert (response.status_code, response.headers["x-request-id"]) == (500, "trace-8")
    assert response.json()["error"]["message"] == "internal error"


def test_what_a_bare_tokenizer_cannot_prompt() -> None:
    tokenizer = Tokenizer(sentencepiece_like())
    engine = FakeEngine(tokenizer)
    app = create_app(engine, ServedModel(id="org/toy", tokenizer=tokenizer, context_len=256))
    client = TestClient(app)
    empty = client.post("/v1/completions", json={**BODY, "prompt": ["the", ""]})
    chat = {"model": "org/toy", "messages": [{"role": "user", "content": "the"}]}
    no_template = client.post("/v1/chat/completions", json=chat)
    assert (empty.status_code, no_template.status_code) == (400, 400)
    assert "the prompt has no tokens" in empty.json()["error"]["message"]
    assert "no chat template" in no_template.json()["error"]["message"]
    assert engine.requests == []


def raw_post(url: str, body: dict[str, object]) -> socket.socket:
    content = json.dumps(body).encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        f"content-length: {len(content)}\r\n\r\n"
    )
    address = urlsplit(url)
    connection = socket.create_connection((address.hostname, address.port), timeout=5)
    connection.sendall(head.encode() + content)
    return connection


def read_events(connection: socket.socket, count: int) -> None:
    received = b""
    while received.count(b"data: ") < count:
        received += connection.recv(4096)


@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_client_that_leaves_cancels_its_requests(
    url: str, engine: FakeEngine, stream: bool, reset: bool
) -> None:
    """Two prompts have begun; no token moves any more, so only the socket can tell."""
    engine.flowing.clear()
    connection = raw_post(url, {**BODY, "prompt": ["the", "cat"], "stream": stream})
    if stream:
        read_events(connection, 2)
    else:
        deadline = time.monotonic() + 5
        while len(engine.requests) < 2 and time.monotonic() < deadline:
            time.sleep(0.005)
    assert engine.cancelled.empty()
    if reset:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()
    cancelled = {engine.cancelled.get(timeout=5) for _ in range(2)}
    assert cancelled == {request.request_id for request in engine.requests}


def test_a_stopping_server_ends_what_runs_past_its_grace(tokenizer: Tokenizer) -> None:
    engine = FakeEngine(tokenizer)
    engine.flowing.clear()
    urls: list[str] = []
    app = create_app(engine, ServedModel(id="org/toy", tokenizer=tokenizer, context_len=256))
    handle = serve(app, port=0, on_ready=urls.append, grace_s=1)
    connection = raw_post(handle.url, {**BODY, "stream": True})
    read_events(connection, 1)
    handle.stop()
    assert engine.cancelled.get(timeout=5) == engine.requests[0].request_id
    assert handle.wait(5)
    assert urls == [handle.url]
    connection.close()


def test_a_taken_port_is_named(url: str, tokenizer: Tokenizer) -> None:
    app = create_app(FakeEngine(tokenizer), ServedModel(id="x", tokenizer=tokenizer, context_len=1))
    port = urlsplit(url).port
    assert port is not None
    with pytest.raises(CannotListen, match=str(port)):
        serve(app, port=port)
