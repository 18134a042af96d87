"""The benchmark's worker process: the product's engine over a real daemon's pool.

    python -m tests.benchmarks.claims.worker SOCKET_DIR NAME

A plan a line on standard input, its outcome on standard output. It attaches, schedules, computes
and publishes with modelworker's own code; requests come from the plan in place of HTTP, and each
step is watched.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from kvd_shared.logs import configure
from kvd_shared.model_folder import model_fingerprint
from modelworker.attachment import Attachment, attach
from modelworker.cli import SHIPPED_MODEL
from modelworker.engine_options import EngineOptions
from modelworker.model import load_model
from modelworker.requests import (
    Delta,
    Emit,
    Event,
    Failed,
    Finished,
    GenerationRequest,
    SamplingParams,
)
from modelworker.scheduler import Limits
from modelworker.tokenizer import Tokenizer
from tests.benchmarks.claims.front import ReservingFront
from tests.benchmarks.claims.measured import MeasuredEngine, Meter
from tests.benchmarks.claims.plan import Outcome, Plan
from tests.benchmarks.claims.reservations import Buddy, FirstFit

# Memory is to be the limit, not these: the token budget is vLLM's default, and no run reaches
# that many sequences. Leases go back as soon as anybody wants the pages: they are not what is used.
LIMITS = Limits(max_batch_tokens=2048, max_sequences=512, lease_ahead_s=0)


def main(socket_dir: Path, name: str) -> None:
    import torch

    torch.set_num_threads(1)  # the tensors are tiny; the other core is the daemon's
    configure("claims", "info", "json", sys.stderr)
    engine = new_engine(socket_dir, name)
    for line in sys.stdin:
        print(run(engine, Plan.from_json(line)).to_json(), flush=True)


def new_engine(socket_dir: Path, name: str) -> MeasuredEngine:
    import torch

    model = load_model(SHIPPED_MODEL, torch.float32)
    fingerprint = model_fingerprint(SHIPPED_MODEL)

    def attach_now() -> Attachment:
        return attach(socket_dir, name, model, fingerprint)

    options = EngineOptions(
        model=f"{fingerprint} float32",
        context_len=model.config.context_length,
        vocab_size=model.config.vocab_size,
        limits=LIMITS,
        max_queued=1 << 20,
    )
    return MeasuredEngine(attach_now, Tokenizer.from_folder(SHIPPED_MODEL), options, attach_now())


def run(engine: MeasuredEngine, plan: Plan) -> Outcome:
    """All requests of the plan, to the end of the last. Raises RuntimeError when one fails."""
    engine.meter = Meter()
    engine.front = _front(engine, plan)
    answers: list[list[int]] = [[] for _ in plan.asks]
    finished: list[Finished] = []

    def listener(answer: list[int]) -> Emit:
        def told(event: Event) -> None:
            if isinstance(event, Failed):
                raise RuntimeError(f"a request failed: {event.error}")
            if isinstance(event, Delta):
                answer.extend(event.token_ids)
            else:
                finished.append(event)

        return told

    began, began_cpu = time.perf_counter(), time.process_time()
    for i, (ask, answer) in enumerate(zip(plan.asks, answers, strict=True)):
        request = GenerationRequest(
            request_id=f"{plan.salt} {i}",
            prompt_ids=ask.prompt,
            params=SamplingParams(max_tokens=ask.num_tokens, temperature=0, ignore_eos=True),
            salt=(f"{plan.salt} {i}" if plan.alone else plan.salt).encode(),
            use_cache=engine.front is None,
        )
        if engine.front is None:
            engine.submit(request, listener(answer))
        else:
            engine.front.submit(request, plan.reserve[i], listener(answer))
    while engine.busy:
        pause = engine.turn()
        if engine.busy:
            time.sleep(pause)
    wall_s, cpu_s = time.perf_counter() - began, time.process_time() - began_cpu
    assert len(finished) == len(plan.asks)
    return Outcome(
        wall_s=wall_s,
        cpu_s=cpu_s,
        num_steps=engine.meter.num_steps,
        computed_tokens=engine.meter.computed_tokens,
        cached_tokens=sum(event.cached_tokens for event in finished),
        usage=engine.meter.mean(),
        answers=answers,
    )


def _front(engine: MeasuredEngine, plan: Plan) -> ReservingFront | None:
    if plan.allocator is None:
        return None
    reservations = (Buddy if plan.allocator == "buddy" else FirstFit)(plan.num_slots)
    return ReservingFront(engine.submit, reservations)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
