"""kvd dies and comes back under real workers: nobody who asks them notices, but for a pause."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest

from tests.daemon import eventually, running_daemon
from tests.integration.http_client import Client, Refused
from tests.integration.restarts import (
    NUM_PAGES,
    Streams,
    kept_daemon_and_workers,
    kill_and_wait,
    play,
)
from tests.integration.test_load import PAGE_SIZE, check_all_given_back
from tests.integration.tiny_world import PRINTABLE, Oracle
from tests.worker import WorkerNursery

NUM_KILLS = int(os.environ.get("KVD_TEST_RESTARTS", "5"))  # 20 and more: the long mode


def some_prompt(seed: int, length: int = 60) -> tuple[int, ...]:
    return tuple(random.Random(seed).choices(PRINTABLE, k=length))


def test_killed_under_load(
    nursery: WorkerNursery, folder: Path, oracle: Oracle, tmp_path: Path
) -> None:
    """Every request that was under way, or comes meanwhile, gets the tokens of an undisturbed run;
    and no session is lost."""
    outcome = play(nursery, folder, oracle, tmp_path, kills=NUM_KILLS)
    print(outcome)
    assert outcome.lost_sessions == 0
    assert len(outcome.resumed_s) == 2 * NUM_KILLS and max(outcome.resumed_s) < 5.0
    assert outcome.token_gap_s


def test_a_cold_start_under_load(
    nursery: WorkerNursery, folder: Path, oracle: Oracle, tmp_path: Path
) -> None:
    """The keeper and the daemon are killed: the pool is gone with them. The workers unmap it and
    compute everything anew, and the streams go on where they were."""
    with kept_daemon_and_workers(nursery, folder, tmp_path, 1) as (daemon, workers):
        streams = Streams(oracle, workers, seed=5)
        with streams.running() as outcome:
            streams.until_answered(2)
            streams.killed()
            daemon.kill()
            time.sleep(0.3)
            daemon.start()
            streams.until_answered(len(workers) * 4)
        assert len(outcome.token_gap_s) >= 2  # there were streams that lived through it
        for worker in workers:
            assert [log["code"] for log in worker.logs("kvd.lost")] == ["POOL_LOST"]
        check_all_given_back(daemon, NUM_PAGES)


def test_a_worker_that_wakes_up_too_late(
    nursery: WorkerNursery, folder: Path, oracle: Oracle, tmp_path: Path
) -> None:
    """It is stopped while it decodes, kvd is restarted, and nobody waits for it any longer: what it
    goes on with is a new session, and its stream is right."""
    grace = "resume_grace_s = 0.5\n"
    with kept_daemon_and_workers(nursery, folder, tmp_path, 1, grace) as (daemon, workers):
        late, other = workers
        prompt = some_prompt(3)
        stream = Client(late.url).stream(prompt, 400)
        text = next(stream)
        os.kill(late.pid, signal.SIGSTOP)
        kill_and_wait(daemon, [other])
        eventually(lambda: daemon.logs("sessions.fenced"), 10)
        for seed in range(8):  # the pages that the late one held are others' now
            mine = some_prompt(10 + seed, 300)
            oracle.check(mine, 20, "".join(Client(other.url).stream(mine, 20)))
        os.kill(late.pid, signal.SIGCONT)
        oracle.check(prompt, 400, text + "".join(stream))
        assert [log["code"] for log in late.logs("kvd.lost")] == ["SESSION_ENDED"]
        eventually(lambda: not daemon.counts()["quarantined"], 10)
        check_all_given_back(daemon, NUM_PAGES)


def test_a_daemon_that_hangs_for_a_while(
    nursery: WorkerNursery, folder: Path, oracle: Oracle, tmp_path: Path
) -> None:
    """It is stopped for longer than a worker waits for an answer, and then answers: what it was
    asked is not asked a second time, and the sessions stay."""
    with kept_daemon_and_workers(nursery, folder, tmp_path, 1) as (daemon, workers):
        streams = Streams(oracle, workers, seed=6)
        with streams.running():
            streams.until_answered(4)
            os.kill(daemon.pid, signal.SIGSTOP)
            eventually(lambda: all(worker.logs("kvd.away") for worker in workers), 10)
            time.sleep(1.0)
            os.kill(daemon.pid, signal.SIGCONT)
            streams.until_answered(8)
        for worker in workers:
            lost = worker.logs("kvd.lost")
            assert worker.logs("kvd.resumed") and not lost, str(lost)
        check_all_given_back(daemon, NUM_PAGES)


def test_an_outage_that_lasts(
    nursery: WorkerNursery, folder: Path, oracle: Oracle, tmp_path: Path
) -> None:
    """A worker says that kvd is away, lets its clients wait, and at the limit tells them to retry;
    when kvd is back it serves."""
    with running_daemon(tmp_path, model=folder, page_size=PAGE_SIZE, num_pages=NUM_PAGES) as daemon:
        worker = nursery.start(daemon, "--kvd-outage-s", "1.5", name="alone")
        prompt = some_prompt(4)
        stream = Client(worker.url).stream(prompt, 900)
        next(stream)
        daemon.kill()
        eventually(lambda: _status(worker.url) == "away")
        began_s = time.monotonic()
        with pytest.raises(Refused) as waited:
            Client(worker.url).complete(prompt, 5)
        assert waited.value.status == 503 and time.monotonic() - began_s > 0.5
        with pytest.raises(Refused) as error:
            list(stream)
        assert error.value.code == "DAEMON_UNREACHABLE"
        assert _status(worker.url) == "detached"
        daemon.start()
        eventually(lambda: _status(worker.url) == "ok")
        oracle.check(prompt, 30, Client(worker.url).complete(prompt, 30).text)
        check_all_given_back(daemon, NUM_PAGES)
        worker.close()


def _status(url: str) -> object:
    client = Client(url)
    try:
        return client.health()["status"]
    finally:
        client.close()
