"""The demo's story, step by step, and what it asserts on the way."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from kvd_shared import verbs
from kvd_shared.calls import Result
from kvd_shared.client import KvdClient
from kvd_shared.model_folder import read_model_folder
from modelworker.demo import report
from modelworker.demo.client import Answer, complete
from modelworker.demo.document import (
    ANSWER_TOKENS,
    CUE_WORDS,
    MIN_ANSWER_CHARACTERS,
    QUOTE,
    Question,
    clean,
    fitting,
    questions,
)
from modelworker.demo.processes import Cluster, DemoFailed, url_of
from modelworker.tokenizer import Tokenizer

POOL_SIZE = "228 pages"
ASKED = 4  # questions
PARALLEL = 4
MEASURED_TOKENS = 1024  # of a document: as far as the model's card has figures
ROOM = 320  # tokens for a cue and what follows it
LONG_ANSWER = 280  # tokens: time enough to look at the pages meanwhile
SHARED_WITHIN_S = 10.0
SETTLED_WITHIN_S = 2.0


def run_demo(model: Path, document: Path, least_right: int = ASKED) -> None:
    """Raises DemoFailed if anything that it shows is not so.

    `least_right`: of the four quotes. The cached and the uncached answer must always be the same.
    """
    tokenizer = Tokenizer.from_folder(model)
    context = read_model_folder(model).context_length
    try:
        whole = clean(document.read_text(encoding="utf-8"))
    except UnicodeDecodeError as e:
        raise DemoFailed(f"{document} is no UTF-8 text: {e}") from e
    text = fitting(whole, tokenizer, min(MEASURED_TOKENS, context - ROOM))
    asked = questions(text)
    if len(asked) < ASKED:
        raise DemoFailed(
            f"{document} has {len(asked)} sentences of enough words in the {len(text)} characters "
            f"that the model reads; the demo asks about {ASKED}: sentences whose first {CUE_WORDS} "
            f"words occur once, with at least {MIN_ANSWER_CHARACTERS} characters behind them"
        )
    with tempfile.TemporaryDirectory(prefix="kvd-demo-") as folder:
        print("starting kvd and two workers …", flush=True)
        with Cluster(model, POOL_SIZE, Path(folder)) as cluster:
            Story(cluster, model.name, text, len(whole), asked, least_right).tell()
    print("\nall of it holds; nothing is left behind")


class Story:
    """One run over a started cluster."""

    def __init__(
        self,
        cluster: Cluster,
        model: str,
        text: str,
        whole: int,
        asked: list[Question],
        least_right: int,
    ) -> None:
        self._least_right = least_right
        self._cluster, self._model, self._text, self._whole = cluster, model, text, whole
        step = (len(asked) - 1) / (ASKED - 1)
        self._questions = [asked[round(i * step)] for i in range(ASKED)]  # spread over the text
        self._verdicts = report.Verdicts()
        self._answers: list[tuple[Question, Answer]] = []

    def tell(self) -> None:
        w0, w1 = self._cluster.start_worker("w0"), self._cluster.start_worker("w1")
        url0, url1 = url_of(w0), url_of(w1)
        read = len(self._text) if len(self._text) < self._whole else self._whole
        report.heading(f"a document of {self._whole} characters, of which the model reads {read}")
        report.columns()
        first = self._ask("w0", url0, 0, "reads it all")
        second = self._ask("w1", url1, 1, "over w0's pages")
        self._ask("w1", url1, 2, "again")
        parallel = self._parallel(url0)
        w0.kill()
        print("kill -9 w0; a new w0 starts", flush=True)
        url0 = url_of(self._cluster.start_worker("w0"))
        again = self._ask("w0", url0, 3, "still cached")
        shared = self._pictures(url0, url1)

        report.heading("what must hold")
        check = self._verdicts.check
        check(first.cached_tokens == 0, "the first worker found nothing cached")
        check(second.cached_tokens > 0, "the second worker used pages that it never computed")
        check(again.cached_tokens > 0, "the cache outlived the worker that had filled it")
        check(shared > 0, f"both workers read the same {shared} pages at the same time")
        check(parallel, f"{PARALLEL} continuations shared the prompt's pages")
        right, total = sum(_quotes(q, a) for q, a in self._answers), len(self._answers)
        check(right >= self._least_right, f"{right} of {total} quotes are word for word")
        self._same_without_cache(url1)
        self._nothing_left()
        self._verdicts.conclude()

    def _ask(self, worker: str, url: str, number: int, remark: str) -> Answer:
        question = self._questions[number]
        answer = complete(url, self._model, self._prompt(question), max_tokens=ANSWER_TOKENS)
        self._answers.append((question, answer))
        mark = "✓" if _quotes(question, answer) else "✗"
        report.row(worker, f"“{question.cue.strip()}”", answer, remark)
        print(f"      {mark} “…{answer.texts[0]}”", flush=True)
        return answer

    def _parallel(self, url: str) -> bool:
        """n continuations of one prompt: all pages but the last are one copy."""
        before = self._counts()["published_pages"]
        answer = complete(
            url,
            self._model,
            self._prompt(self._questions[0]),
            max_tokens=8,
            n=PARALLEL,
            temperature=0.7,
            seed=7,
        )
        new = self._counts()["published_pages"] - before
        alone = PARALLEL * -(-answer.prompt_tokens // 16)
        remark = f"{new} new pages, not {alone}"
        report.row("w0", f"the same, n={PARALLEL}", answer, remark)
        return len(answer.texts) == PARALLEL and new <= PARALLEL and answer.cached_tokens > 0

    def _same_without_cache(self, url: str) -> None:
        same = 0
        for question, answer in self._answers:
            plain = complete(
                url,
                self._model,
                self._prompt(question),
                max_tokens=ANSWER_TOKENS,
                x_kvd={"no_cache": True},
            )
            same += plain.texts == answer.texts and plain.cached_tokens == 0
        total = len(self._answers)
        self._verdicts.check(same == total, f"{same} of {total} answers are the same uncached")

    def _nothing_left(self) -> None:
        # A worker gives pages back with its next step, a moment after it has answered.
        deadline = time.monotonic() + SETTLED_WITHIN_S
        while self._counts()["counts"]["active"] and time.monotonic() < deadline:
            time.sleep(0.01)
        pool, counts = self._counts(), self._counts()["counts"]
        with self._admin() as admin:
            audit = admin.call(verbs.audit())
            held = [s["held_pages"] for s in admin.call(verbs.sessions())["sessions"]]
        self._verdicts.check(not any(held), "no session holds a page any more")
        whole = counts["free"] + counts["cached"] == pool["num_pages"]
        self._verdicts.check(
            whole,
            f"no page is leaked: {counts['free']} free + {counts['cached']} cached "
            f"= {pool['num_pages']}",
        )
        self._verdicts.check(audit["ok"], "the audit of all invariants is clean")

    def _pictures(self, *urls: str) -> int:
        """Page map and tree while both workers answer from the same document; returns how many
        pages they were seen to hold together."""
        with ThreadPoolExecutor() as threads:
            fields = {"max_tokens": LONG_ANSWER, "ignore_eos": True}
            asked = [
                threads.submit(complete, url, self._model, self._prompt(question), **fields)
                for url, question in zip(urls, self._questions, strict=False)
            ]
            deadline, shared = time.monotonic() + SHARED_WITHIN_S, 0
            while not shared and time.monotonic() < deadline:
                shared = self._counts()["shared_pages"]
            self._draw()
            for answer in asked:
                answer.result()  # raises what went wrong there
        return shared

    def _draw(self) -> None:
        for verb in ("pages", "tree"):
            report.heading(f"$ kvdctl {verb}")
            command = [sys.executable, "-m", "kvd.admin", verb]
            command += ["--socket-dir", str(self._cluster.socket_dir)]
            subprocess.run(command, check=True)

    def _prompt(self, question: Question) -> str:
        return f"{self._text}{QUOTE}{question.cue}"

    def _counts(self) -> Result:
        with self._admin() as admin:
            pools: list[Result] = admin.call(verbs.status())["pools"]
        return pools[0]

    def _admin(self) -> KvdClient:
        return KvdClient.attach(self._cluster.socket_dir, name="demo", role="admin")


def _quotes(question: Question, answer: Answer) -> bool:
    """The answer goes on as the document does, as far as both go."""
    text = answer.texts[0]
    length = min(len(text), len(question.answer))
    return length >= min(8, len(question.answer)) and text[:length] == question.answer[:length]
