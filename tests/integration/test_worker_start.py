"""How a worker starts, refuses to start, and ends."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvd_shared import exit_codes
from kvd_shared.model_folder import model_fingerprint
from tests.daemon import RunningDaemon, eventually, running_daemon
from tests.integration.http_client import Client, Refused
from tests.integration.test_load import check_all_given_back
from tests.integration.tiny_world import PRINTABLE, Oracle, make_folder
from tests.worker import WorkerNursery, running_worker

PAGE_SIZE = 8
NUM_PAGES = 64
PROMPT = tuple(PRINTABLE)[:30]


@pytest.fixture
def daemon(folder: Path, tmp_path: Path) -> Iterator[RunningDaemon]:
    with running_daemon(tmp_path, model=folder, page_size=PAGE_SIZE, num_pages=NUM_PAGES) as daemon:
        yield daemon


def changed_copy(folder: Path, copy: Path, key: str, value: object) -> Path:
    """The folder with another value in its config.json."""
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {key: value}))
    return copy


def status(client: Client) -> str:
    """What /health says, "closed" where nobody answers."""
    try:
        told: str = client.health()["status"]
    except OSError:
        return "closed"
    return told


def busy(url: str) -> tuple[int, int]:
    """How many sequences run in a worker, and how many wait."""
    health = Client(url).health()
    return health["running"], health["waiting"]


def test_the_command_itself(
    daemon: RunningDaemon, folder: Path, tmp_path: Path, oracle: Oracle
) -> None:
    """Not forked: from the command line to exit code 0."""
    with running_worker(daemon, folder, tmp_path, "--host", "::1") as worker:
        assert worker.url.startswith("http://[::1]:")
        oracle.check(PROMPT, 9, Client(worker.url).complete(PROMPT, 9).text)
        assert worker.stop() == exit_codes.OK
        assert [line["event"] for line in worker.logs()][-1] == "worker.stopped"
        check_all_given_back(daemon, NUM_PAGES)


def test_another_model_than_the_pools(
    daemon: RunningDaemon, folder: Path, nursery: WorkerNursery, tmp_path: Path
) -> None:
    other = changed_copy(folder, tmp_path / "other", "rope_theta", 5000.0)
    worker = nursery.start(daemon, folder=other)
    assert worker.wait() == exit_codes.INCOMPATIBLE
    assert model_fingerprint(folder) in worker.text()
    assert model_fingerprint(other) in worker.text()
    check_all_given_back(daemon, NUM_PAGES)


def test_another_layout_than_the_pools(nursery: WorkerNursery, tmp_path: Path) -> None:
    with running_daemon(tmp_path, num_layers=3, num_kv_heads=2, head_dim=12) as daemon:
        worker = nursery.start(daemon)
        assert worker.wait() == exit_codes.INCOMPATIBLE
        assert "'head_dim': 10" in worker.text() and "'head_dim': 12" in worker.text()


def test_a_pool_that_there_is_not(daemon: RunningDaemon, nursery: WorkerNursery) -> None:
    worker = nursery.start(daemon, "--pool", "spare")
    assert worker.wait() == exit_codes.INCOMPATIBLE
    assert "'spare'" in worker.text() and "default" in worker.text()


def test_model_folders_that_cannot_be_served(
    daemon: RunningDaemon, folder: Path, nursery: WorkerNursery, tmp_path: Path
) -> None:
    sharded = tmp_path / "sharded"
    sharded.mkdir()
    make_folder(sharded, shards=True)
    missing = sorted(sharded.glob("model-*.safetensors"))[1]
    missing.unlink()
    foreign = changed_copy(folder, tmp_path / "foreign", "architectures", ["GPT2LMHeadModel"])
    mute = shutil.copytree(folder, tmp_path / "mute")
    (mute / "tokenizer.json").unlink()
    for bad, said in [
        (sharded, missing.name),
        (foreign, "GPT2LMHeadModel"),
        (mute, "tokenizer.json"),
        (tmp_path / "nowhere", "nowhere"),
    ]:
        worker = nursery.start(daemon, folder=bad)
        assert worker.wait() == exit_codes.BAD_CONFIG
        assert said in worker.text() and "Traceback" not in worker.text(), worker.text()


def test_a_port_that_is_taken(daemon: RunningDaemon, nursery: WorkerNursery) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        worker = nursery.start(daemon, "--port", port)
        assert worker.wait() == exit_codes.RUNTIME_ERROR
    assert port in worker.text() and "Traceback" not in worker.text()
    check_all_given_back(daemon, NUM_PAGES)


def test_workers_that_start_before_the_daemon(
    daemon: RunningDaemon, nursery: WorkerNursery, oracle: Oracle
) -> None:
    """One attaches when the daemon is there; one is told to stop before that."""
    daemon.kill()
    patient, stopped = nursery.start(daemon, name="patient"), nursery.start(daemon)
    eventually(lambda: patient.logs("kvd.awaited") and stopped.logs("kvd.awaited"), 10)
    assert stopped.stop() == exit_codes.OK
    daemon.start()
    oracle.check(PROMPT, 9, Client(patient.url).complete(PROMPT, 9).text)
    patient.close()


def test_sigterm_lets_what_was_accepted_finish(
    daemon: RunningDaemon, nursery: WorkerNursery, oracle: Oracle
) -> None:
    """One runs and two wait when the signal comes; what comes after it is refused."""
    worker = nursery.start(daemon, "--max-seqs", "1")
    prompts = [tuple(PRINTABLE)[i : i + 30] for i in range(3)]
    lengths = [400, 50, 50]
    answers = [""] * 3

    def ask(i: int) -> None:
        answers[i] = Client(worker.url).complete(prompts[i], lengths[i]).text

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(3)]
    late = Client(worker.url)
    threads[0].start()
    eventually(lambda: busy(worker.url) == (1, 0))
    for thread in threads[1:]:
        thread.start()
    eventually(lambda: busy(worker.url) == (1, 2))
    signal.pidfd_send_signal(worker.pidfd, signal.SIGTERM)
    eventually(lambda: status(late) in ("stopping", "closed"))
    with pytest.raises((Refused, OSError)) as refusal:
        late.complete(PROMPT, 1)
    if isinstance(refusal.value, Refused):
        assert (refusal.value.status, refusal.value.code) == (503, "DRAINING")
    for thread in threads:
        thread.join()
    for prompt, length, answer in zip(prompts, lengths, answers, strict=True):
        oracle.check(prompt, length, answer)
    assert worker.wait() == exit_codes.OK
    check_all_given_back(daemon, NUM_PAGES)


def test_clients_that_hang_up_free_their_pages(
    daemon: RunningDaemon, nursery: WorkerNursery
) -> None:
    """In the middle of a stream, while waiting for a whole answer, and while still queued."""
    worker = nursery.start(daemon, "--max-seqs", "2")
    streamed, whole, queued = (Client(worker.url) for _ in range(3))
    pieces = streamed.stream(PROMPT, 400)
    next(pieces)
    whole.send(PROMPT[1:], 400)
    eventually(lambda: busy(worker.url) == (2, 0))
    queued.send(PROMPT[2:], 400, stream=True)
    eventually(lambda: busy(worker.url) == (2, 1))
    assert daemon.sessions()["worker"]["held_pages"] > 0
    for client in (queued, streamed, whole):
        client.hang_up()
    eventually(lambda: busy(worker.url) == (0, 0))
    eventually(lambda: daemon.sessions()["worker"]["held_pages"] == 0)
    check_all_given_back(daemon, NUM_PAGES)
    worker.close()


def test_what_the_pool_can_never_hold(
    folder: Path, nursery: WorkerNursery, oracle: Oracle, tmp_path: Path
) -> None:
    """Both numbers are told; what just fits, does."""
    with running_daemon(tmp_path, model=folder, page_size=PAGE_SIZE, num_pages=5) as daemon:
        worker = nursery.start(daemon)
        client = Client(worker.url)
        with pytest.raises(Refused, match=r"\b41\b.*\b40\b") as refusal:
            client.complete(PROMPT, 11)
        assert (refusal.value.status, refusal.value.code) == (413, "REQUEST_TOO_LONG")
        oracle.check(PROMPT, 10, client.complete(PROMPT, 10).text)
        answer = client.complete(PROMPT, 10, n=8)  # more sequences than pages
        oracle.check(PROMPT, 10, answer.text)
        check_all_given_back(daemon, 5)
        worker.close()
