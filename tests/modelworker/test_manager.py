"""What a worker tells its service manager, and how often."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from modelworker.manager import FEEDS_A_LIMIT, Manager

SILENCE_S = 0.2


@pytest.fixture
def inbox(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as inbox:
        inbox.bind(str(tmp_path / "notify"))
        inbox.setblocking(False)
        yield inbox


def environment(inbox: socket.socket, **more: str) -> dict[str, str]:
    return {"NOTIFY_SOCKET": inbox.getsockname()} | more


def told(inbox: socket.socket) -> list[str]:
    messages = []
    while True:
        try:
            messages.append(inbox.recv(1000).decode())
        except BlockingIOError:
            return messages


def test_the_loop_feeds_the_watchdog_as_often_as_needed(
    inbox: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    pid = str(os.getpid())
    env = environment(inbox, WATCHDOG_USEC=str(int(SILENCE_S * 1e6)), WATCHDOG_PID=pid)
    manager = Manager.from_environment(env)
    assert env == {}  # no child speaks in its name
    manager.ready("serving")
    for turn in range(100):
        monkeypatch.setattr(time, "monotonic", lambda turn=turn: 1000 + turn * SILENCE_S / 100)
        manager.alive()
    manager.stopping()
    ready, *fed, stopping = told(inbox)
    assert ready == "READY=1\nSTATUS=serving" and stopping == "STOPPING=1"
    assert set(fed) == {"WATCHDOG=1"} and len(fed) == FEEDS_A_LIMIT


@pytest.mark.parametrize("more", [{}, {"WATCHDOG_USEC": "1000", "WATCHDOG_PID": "1"}])
def test_nobody_watches_this_process(inbox: socket.socket, more: dict[str, str]) -> None:
    Manager.from_environment(environment(inbox, **more)).alive()
    assert told(inbox) == []


@pytest.mark.parametrize("address", [None, "nonsense", "/nobody/listens"])
def test_a_manager_that_is_not_there_ends_nothing(address: str | None) -> None:
    env = {"WATCHDOG_USEC": "1"} | ({"NOTIFY_SOCKET": address} if address else {})
    manager = Manager.from_environment(env)
    manager.ready("serving")
    manager.alive()
    manager.stopping()
