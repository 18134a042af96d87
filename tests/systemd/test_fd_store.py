"""What a daemon does with LISTEN_FDS: what is meant for it, and what is not."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from kvd.fd_store import FdStore, received_fds
from kvd.survival import KEEPER, NONE, SYSTEMD, Survival


@pytest.fixture
def memories() -> Iterator[list[int]]:
    """Three memfds with neighbouring numbers, as a manager passes them."""
    first = 900
    fds = []
    for number in range(3):
        memory = os.memfd_create("test")
        fds.append(os.dup2(memory, first + number, inheritable=True))
        os.close(memory)
    yield fds
    for fd in fds:
        if is_open(fd):
            os.close(fd)


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def listen(count: object, names: str, pid: object = None) -> dict[str, str]:
    pid = os.getpid() if pid is None else pid
    return {"LISTEN_FDS": str(count), "LISTEN_FDNAMES": names, "LISTEN_PID": str(pid), "A": "1"}


def test_by_name_and_not_for_children(memories: list[int]) -> None:
    env = listen(3, "meta.a:pool.a.0:pool.a.1")
    found = received_fds(env, memories[0])
    assert found == {"meta.a": [900], "pool.a.0": [901], "pool.a.1": [902]}
    assert not any(os.get_inheritable(fd) for fd in memories)
    assert env == {"A": "1"}


@pytest.mark.parametrize(
    "env",
    [
        listen(3, "a:b:c", pid=1),
        listen(3, "a:b:c", pid=""),
        listen(2, "a:b:c"),
        listen(-1, "a"),
        listen("3x", "a:b:c"),
        listen(10**9, "a:b:c"),
        listen(3, ""),
        {"LISTEN_FDS": "3", "A": "1"},
        {"A": "1"},
    ],
)
def test_what_makes_no_sense_is_left_alone(env: dict[str, str], memories: list[int]) -> None:
    """Whose files these numbers are is not known, so they are neither used nor closed."""
    assert received_fds(env, memories[0]) == {}
    assert env == {"A": "1"}
    assert all(is_open(fd) and os.get_inheritable(fd) for fd in memories)


def test_an_fd_that_is_not_there_is_left_out(memories: list[int]) -> None:
    os.close(memories[1])
    assert received_fds(listen(3, "a:b:c"), memories[0]) == {"a": [900], "c": [902]}


def test_a_name_that_came_twice_is_nobodys(memories: list[int]) -> None:
    store = FdStore(None, {"a": memories[:2], "b": memories[2:]})
    assert store.take("a") is None and store.take("absent") is None
    assert store.take("b") == memories[2] and store.take("b") is None
    assert store.names() == ["a"]
    store.remove(["a", "absent"])
    assert [is_open(fd) for fd in memories] == [False, False, True]


def test_what_nobody_took_is_closed(memories: list[int]) -> None:
    store = FdStore(None, {"a": memories[:1], "b": memories[1:]})
    assert store.take("a") == memories[0]
    store.close()
    store.close()
    assert [is_open(fd) for fd in memories] == [True, False, False]


def test_who_keeps_the_memory() -> None:
    assert Survival.from_environment({}).kind == NONE
    assert Survival.from_environment({"NOTIFY_SOCKET": "@a"}).kind == SYSTEMD
    parent = {"NOTIFY_SOCKET": "@a", "KEEPER_PID": str(os.getppid())}
    assert Survival.from_environment(parent).kind == KEEPER
    assert parent == {}
    inherited = {"NOTIFY_SOCKET": "@a", "KEEPER_PID": "1000000000"}
    assert Survival.from_environment(inherited).kind == SYSTEMD
    assert Survival.from_environment({"NOTIFY_SOCKET": "nonsense"}).kind == NONE


def test_the_watchdog_is_this_processs_own() -> None:
    def watchdog_s(**env: str) -> float | None:
        return Survival.from_environment({"NOTIFY_SOCKET": "@a", **env}).watchdog_s

    assert watchdog_s(WATCHDOG_USEC="30000000") == 30
    assert watchdog_s(WATCHDOG_USEC="500000", WATCHDOG_PID=str(os.getpid())) == 0.5
    assert watchdog_s(WATCHDOG_USEC="30000000", WATCHDOG_PID="1") is None
    assert watchdog_s(WATCHDOG_USEC="0") is None and watchdog_s(WATCHDOG_USEC="soon") is None
    assert watchdog_s() is None


def test_a_manager_that_is_gone_ends_the_survival_and_not_the_daemon() -> None:
    survival = Survival.from_environment({"NOTIFY_SOCKET": "@kvd-nobody-has-this"})
    lost: list[str] = []
    survival.on_lost = lambda: lost.append(survival.kind)
    for _ in range(2):
        survival.alive()
        survival.keep({"a": 0}, total=1)
        survival.forget(["a"])
        survival.ready("ready")
    assert (survival.kind, survival.watchdog_s, lost) == (NONE, None, [NONE])


def test_more_fds_than_the_manager_keeps_are_said_beforehand() -> None:
    survival = Survival.from_environment({"NOTIFY_SOCKET": "@a", "FDSTORE": "2"})
    survival.keep({"c": 2}, total=3)
    assert survival.kind == NONE
