"""Continuations that branch share all they have in common: exact page counts of a real pool."""

from __future__ import annotations

import json
import random
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from kvd_shared import verbs
from kvd_shared.layout import pages_needed
from modelworker.model import load_model
from modelworker.pool_view import PoolView
from modelworker.runner import ModelRunner
from tests.daemon import RunningDaemon, eventually, running_daemon
from tests.integration.http_client import Client
from tests.integration.test_load import check_all_given_back
from tests.integration.tiny_world import PRINTABLE, Oracle
from tests.modelworker.beam import BeamSearch
from tests.worker import WorkerNursery

PAGE_SIZE = 16
NUM_PAGES = 96


def prompt_of(length: int) -> tuple[int, ...]:
    return tuple(random.Random(length).choices(PRINTABLE, k=length))


def texts_of(url: str, prompt: tuple[int, ...], num_new: int, **options: Any) -> list[str]:
    """All choices of one completion."""
    body = {"model": "tiny", "prompt": prompt, "max_tokens": num_new, "temperature": 0} | options
    headers = {"content-type": "application/json"}
    request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as reply:
        return [choice["text"] for choice in json.load(reply)["choices"]]


def counters(daemon: RunningDaemon) -> dict[str, Any]:
    pool: dict[str, Any] = daemon.ask(verbs.status())["pools"][0]
    return pool


@pytest.mark.parametrize(("num_prompt", "num_copied"), [(512, 0), (509, 7)])
def test_eight_continuations_of_one_prompt(
    nursery: WorkerNursery,
    folder: Path,
    oracle: Oracle,
    tmp_path: Path,
    num_prompt: int,
    num_copied: int,
) -> None:
    """The prompt is computed once and its pages are there once; each continuation has a tail of its
    own, and pages for what it generates."""
    prompt, num_new, n = prompt_of(num_prompt), 12, 8
    with running_daemon(tmp_path, model=folder, page_size=PAGE_SIZE, num_pages=NUM_PAGES) as daemon:
        url = nursery.start(daemon, name="forks").url
        texts = texts_of(url, prompt, num_new, n=n)
        oracle.check(prompt, num_new, texts[0])
        assert texts == [texts[0]] * n
        check_all_given_back(daemon, NUM_PAGES)
        # of the last new token no K and V are needed
        full, own = num_prompt // PAGE_SIZE, pages_needed(num_prompt + num_new - 1, PAGE_SIZE)
        counted = counters(daemon)
        assert counted["allocated_pages"] == full + n * (own - full)
        assert counted["copied_pages"] == num_copied
        assert Client(url).health()["computed_tokens"] == num_prompt + n * (num_new - 1)


def test_seeded_continuations_are_those_of_single_requests(
    nursery: WorkerNursery, folder: Path, tmp_path: Path
) -> None:
    prompt, seed = prompt_of(70), 5
    with running_daemon(tmp_path, model=folder, page_size=PAGE_SIZE, num_pages=NUM_PAGES) as daemon:
        url = nursery.start(daemon, name="seeds").url
        chance: dict[str, Any] = {"temperature": 0.8}
        together = texts_of(url, prompt, 20, n=4, seed=seed, **chance)
        chance["x_kvd"] = {"no_cache": True}
        alone = [texts_of(url, prompt, 20, seed=seed + i, **chance)[0] for i in range(4)]
        assert together == alone and len(set(together)) == 4
        check_all_given_back(daemon, NUM_PAGES)


@pytest.mark.parametrize("num_prompt", [512, 505])
def test_a_beam_of_four_over_shared_pages(folder: Path, tmp_path: Path, num_prompt: int) -> None:
    """The four best continuations are those of transformers; the prompt's pages are there once, and
    only last pages are copied, each time one less than there are beams that go on from it."""
    prompt, num_new, width = list(prompt_of(num_prompt)), 24, 4
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.inference_mode():
        expected = model.generate(
            torch.tensor([prompt]),
            num_beams=width,
            num_return_sequences=width,
            do_sample=False,
            min_new_tokens=num_new,
            max_new_tokens=num_new,
            pad_token_id=0,
        )
    with (
        running_daemon(tmp_path, model=folder, page_size=PAGE_SIZE, num_pages=NUM_PAGES) as daemon,
        daemon.attach("beam") as client,
    ):
        assert client.pool is not None and client.mapping is not None
        view = PoolView.attached(client.pool, client.mapping)
        search = BeamSearch(client, ModelRunner(load_model(folder, torch.float32), view), width)
        beams = search.run(prompt, num_new)
        assert [beam.tokens for beam in beams] == expected.tolist()
        common = set.intersection(*(set(beam.refs) for beam in beams))
        assert len(common) >= num_prompt // PAGE_SIZE
        distinct = len(set.union(*(set(beam.refs) for beam in beams)))
        assert daemon.counts()["free"] == NUM_PAGES - distinct
        # steps that write into a page that is there already, each after a choice
        writes = range(num_prompt, num_prompt + num_new - 1)
        into_old = [i for i, position in enumerate(writes) if position % PAGE_SIZE]
        copied = sum(width - search.parents[i] for i in into_old)
        opened = width * (len(writes) - len(into_old))
        counted = counters(daemon)
        assert search.num_copied == counted["copied_pages"] == copied > 0
        in_prompt = pages_needed(num_prompt, PAGE_SIZE)
        assert counted["allocated_pages"] == in_prompt + opened + copied
        search.free(beams)
        eventually(lambda: daemon.counts()["free"] == NUM_PAGES)
        check_all_given_back(daemon, NUM_PAGES)
