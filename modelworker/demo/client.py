"""The demo as a client of the workers' HTTP API."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any

from modelworker.demo.processes import DemoFailed

TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class Answer:
    """The texts of a completion's choices, and its usage."""

    texts: list[str]
    prompt_tokens: int
    cached_tokens: int
    seconds: float


def complete(url: str, model: str, prompt: str, **fields: Any) -> Answer:
    """POST /v1/completions. Raises DemoFailed with what the worker answered."""
    body = json.dumps({"model": model, "prompt": prompt, "temperature": 0, **fields}).encode()
    request = urllib.request.Request(
        f"{url}/v1/completions", body, {"Content-Type": "application/json"}
    )
    start = time.perf_counter()
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
            reply = json.load(response)
    except urllib.error.HTTPError as e:
        raise DemoFailed(f"{url} answered {e.code}: {e.read().decode(errors='replace')}") from e
    except OSError as e:
        raise DemoFailed(f"{url} did not answer: {e}") from e
    usage = reply["usage"]
    return Answer(
        [choice["text"] for choice in reply["choices"]],
        usage["prompt_tokens"],
        usage["prompt_tokens_details"]["cached_tokens"],
        time.perf_counter() - start,
    )
