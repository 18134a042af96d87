"""Does the paged path compute what the dense path computes? For a model folder, in float32.

Each case prefills a prompt into pages in its own way, then decodes 64 tokens along the dense path's
greedy choice, so that a first difference does not hide the rest.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

import torch

from kvd_shared import exit_codes
from kvd_shared.layout import pages_needed
from kvd_shared.model_folder import BadModelFolder
from kvd_shared.progress import progress_line
from modelworker.dense import DenseSequence
from modelworker.model import Model, load_model
from modelworker.pool_view import PoolView
from modelworker.runner import ModelRunner, SequenceChunk
from modelworker.tokenizer import Tokenizer

TOLERANCE = 1e-4  # of the range of the dense path's logits
DECODED = 64  # tokens a case
PAGE_SIZE = 16
CHUNKS = (1, 7, 16, 512)
TEXT = (
    "A page is fixed-size storage for the keys and values of consecutive tokens. The first worker "
    "that reads a prompt fills its pages; every other worker that meets the same beginning finds "
    "them there and starts where they end."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    name: str
    prompt: tuple[int, ...]
    cached_pages: int = 0  # filled by another sequence with the same prompt
    chunk: int = 1 << 30  # most tokens a prefill pass


@dataclass(frozen=True, slots=True)
class Dense:
    """The oracle's answer to a prompt."""

    tokens: list[int]  # DECODED greedy choices
    logits: torch.Tensor  # float32[DECODED, vocab], what they were chosen from

    @property
    def range(self) -> float:
        return float(self.logits.max() - self.logits.min())


@dataclass(frozen=True, slots=True)
class CaseResult:
    case: Case
    difference: float  # largest of the logits, in parts of the dense path's range
    near_ties: int  # other tokens chosen where the dense path's best two lie within TOLERANCE
    wrong_tokens: int  # other tokens chosen elsewhere

    @property
    def agrees(self) -> bool:
        return self.difference <= TOLERANCE and not self.wrong_tokens  # NaN does not


@dataclass(slots=True)
class VerifyReport:
    results: list[CaseResult] = field(default_factory=list)

    @property
    def agrees(self) -> bool:
        return bool(self.results) and all(result.agrees for result in self.results)

    @property
    def largest_difference(self) -> float:
        return max(result.difference for result in self.results)

    @property
    def near_ties(self) -> int:
        return sum(result.near_ties for result in self.results)


def run_verify(folder: Path, stream: TextIO) -> int:
    """Compare and print a table to `stream`, a row as each case ends; returns the exit code.

    Raises BadModelFolder.
    """
    print(f"{folder}: paged against dense, float32, tolerance {TOLERANCE:g} of range", file=stream)
    with progress_line(stream, "loading the weights") as progress:
        model = load_model(folder, torch.float32, progress=progress)
    print(f"{'case':<28} {'prompt':>6} {'cached':>6}  difference  near ties  wrong", file=stream)
    report = VerifyReport()
    for result in verify(folder, model):
        report.results.append(result)
        print(_row(result), file=stream, flush=True)
    print(
        f"{'agree' if report.agrees else 'DISAGREE'}: {len(report.results)} cases, largest "
        f"difference {report.largest_difference:.1e} of range, {report.near_ties} near ties",
        file=stream,
        flush=True,
    )
    return exit_codes.OK if report.agrees else exit_codes.PROBLEM_FOUND


def verify(folder: Path, model: Model) -> Iterator[CaseResult]:
    """Compare case by case, each yielded as it ends; `model` is the folder's, in float32.

    Raises BadModelFolder when its context is too short to decode in.
    """
    answers: dict[tuple[int, ...], Dense] = {}
    for case in cases(folder, model):
        if case.prompt not in answers:
            answers[case.prompt] = answer_densely(model, case.prompt)
        yield compare(model, case, answers[case.prompt])


def cases(folder: Path, model: Model) -> list[Case]:
    """Prompts cold, behind cached pages, and in chunks, within the model's context."""
    chance = torch.Generator().manual_seed(0)
    longest = model.config.context_length - DECODED
    if longest < 1:
        raise BadModelFolder(
            f"{folder}: a context of {model.config.context_length} tokens leaves no room for a "
            f"prompt before {DECODED} decoded ones"
        )

    def random(length: int) -> tuple[int, ...]:
        size = (min(length, longest),)
        return tuple(torch.randint(model.config.vocab_size, size, generator=chance).tolist())

    found = [Case(name="cold, random", prompt=random(length)) for length in (1, 16, 53)]
    if (folder / "tokenizer.json").is_file():
        text = Tokenizer.from_folder(folder).encode(TEXT)
        if max(text) >= model.config.vocab_size:
            raise BadModelFolder(
                f"{folder}: tokenizer.json gives token {max(text)}, but config.json has "
                f"vocab_size = {model.config.vocab_size}"
            )
        found.append(Case(name="cold, text", prompt=tuple(text[:longest])))
    for case in list(found):
        most = (len(case.prompt) - 1) // PAGE_SIZE  # the last token is always computed
        for k in range(1, most + 1):
            name = case.name.replace("cold", f"{k} cached page{'s' if k > 1 else ''}")
            found.append(Case(name=name, prompt=case.prompt, cached_pages=k))
    for chunk in CHUNKS:
        prompt = random(chunk + PAGE_SIZE + 3)  # two passes at least, the last one not full
        found.append(Case(name=f"prefill in chunks of {chunk}", prompt=prompt, chunk=chunk))
    return found


def answer_densely(model: Model, prompt: tuple[int, ...]) -> Dense:
    sequence = DenseSequence(model)
    tokens, rows = list(prompt), []
    for _ in range(DECODED):
        rows.append(sequence.append(tokens))
        tokens = [int(rows[-1].argmax())]
    logits = torch.stack(rows)
    return Dense(logits.argmax(dim=-1).tolist(), logits)


def compare(model: Model, case: Case, dense: Dense) -> CaseResult:
    """Run one case over fresh pages and hold it against the dense answer."""
    paged = torch.cat(list(_paged_logits(model, case, dense.tokens)))
    difference = (paged - dense.logits).abs().max() / dense.range
    best_two = dense.logits.topk(2, dim=-1).values
    near = best_two[:, 0] - best_two[:, 1] <= TOLERANCE * dense.range
    other = paged.argmax(dim=-1) != torch.tensor(dense.tokens)
    return CaseResult(
        case,
        float(difference.nan_to_num(nan=float("inf"))),
        int((other & near).sum()),
        int((other & ~near).sum()),
    )


def _paged_logits(model: Model, case: Case, decoded: list[int]) -> Iterator[torch.Tensor]:
    """Logits float32[1, vocab] after the prompt and after each decoded token but the last."""
    prompt, shared = case.prompt, case.cached_pages
    num_pages = pages_needed(len(prompt) + len(decoded), PAGE_SIZE)
    runner = ModelRunner(model, PoolView.private(model.config.layout(PAGE_SIZE), 2 * num_pages))
    ids = torch.randperm(2 * num_pages, generator=torch.Generator().manual_seed(1)).tolist()
    first_table = ids[:num_pages]
    if shared:
        runner.run([SequenceChunk(prompt, 0, first_table, wants_logits=False)])
    table = first_table[:shared] + ids[num_pages : 2 * num_pages - shared]
    logits = torch.empty(0)
    for start in range(shared * PAGE_SIZE, len(prompt), case.chunk):
        part = prompt[start : start + case.chunk]
        logits = runner.run([SequenceChunk(part, start, table, wants_logits=True)])
    yield logits
    for position, token in enumerate(decoded[:-1], start=len(prompt)):
        yield runner.run([SequenceChunk([token], position, table, wants_logits=True)])


def _row(result: CaseResult) -> str:
    case = result.case
    return (
        f"{case.name:<28} {len(case.prompt):>6} {case.cached_pages * PAGE_SIZE:>6} "
        f"{result.difference:>11.1e} {result.near_ties:>10} {result.wrong_tokens:>6}"
        f"{'' if result.agrees else '  DISAGREES'}"
    )
