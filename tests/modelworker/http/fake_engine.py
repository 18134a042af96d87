"""An engine that generates known text at a known pace, and remembers what it was asked."""

from __future__ import annotations

import queue
import threading

from kvd_shared.errors import KvdError
from modelworker.detokenize import IncrementalText
from modelworker.requests import Delta, Emit, Failed, Finished, FinishReason, GenerationRequest
from modelworker.tokenizer import Tokenizer

TEXT = "the cat sat on the mat 你好😀 END OF TEXT"


class FakeEngine:
    """Continuation i is f"{i} {TEXT}" and then eos; half of each prompt counts as cached.

    `requests`: all that were accepted. `cancelled`: request ids, in order. While `flowing` is
    clear, each request stops after its first token, until it is cancelled. `refusal` is raised by
    `submit` once `accept` requests were accepted; `failure` ends requests after their first token.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.flowing = threading.Event()
        self.cancelled: queue.Queue[str] = queue.Queue()
        self.reset()

    def reset(self) -> None:
        self.requests: list[GenerationRequest] = []
        self.refusal: KvdError | None = None
        self.accept = 0
        self.failure: KvdError | None = None
        self.status = "ok"
        self.flowing.set()
        self._live: dict[str, threading.Event] = {}  # request id -> set when it is cancelled
        while not self.cancelled.empty():
            self.cancelled.get()

    def submit(self, request: GenerationRequest, emit: Emit) -> None:
        if self.refusal is not None and len(self.requests) >= self.accept:
            raise self.refusal
        self.requests.append(request)
        gone = self._live[request.request_id] = threading.Event()
        threading.Thread(target=self._run, args=(request, emit, gone), daemon=True).start()

    def cancel(self, request_id: str) -> None:
        if request_id in self._live:
            self._live[request_id].set()
            self.cancelled.put(request_id)

    def health(self) -> dict[str, object]:
        return {"status": self.status, "running": len(self._live), "waiting": 0}

    def _run(self, request: GenerationRequest, emit: Emit, gone: threading.Event) -> None:
        sequences = [_Sequence(self._tokenizer, request, index) for index in range(request.n)]
        while sequences:
            sequences = [sequence for sequence in sequences if sequence.step(emit)]
            if self.failure is not None:
                emit(Failed(self.failure))
                break
            while not self.flowing.wait(0.002):
                if gone.is_set():
                    return
        self._live.pop(request.request_id, None)


class _Sequence:
    def __init__(self, tokenizer: Tokenizer, request: GenerationRequest, index: int) -> None:
        self._index = index
        self._ids = tokenizer.encode(f"{index} {TEXT}", add_special_tokens=False)
        self._text = IncrementalText(tokenizer, request.params.stop)
        self._max_tokens = request.params.max_tokens
        self._cached = len(request.prompt_ids) // 2
        self._done = 0

    def step(self, emit: Emit) -> bool:
        """One token; False where it was the last."""
        token_id = self._ids[self._done]
        self._done += 1
        text = self._text.push([token_id])
        reason: FinishReason | None = None
        if self._text.stopped or self._done == len(self._ids):
            reason = "stop"
        elif self._done == self._max_tokens:
            reason = "length"
        emit(Delta(self._index, text + (self._text.flush() if reason else ""), (token_id,)))
        if reason is not None:
            emit(Finished(self._index, reason, self._done, self._cached))
        return reason is None
