"""The loop that takes a ZeroMQ socket's turns while it waits: nobody is left waiting."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import zmq

from kvd.serving_loop import ServingLoop, ServingSelector

LIMIT_S = 5.0
SOON_S = 2.0  # on a busy machine


class Served:
    """A ROUTER whose messages the loop takes, and a DEALER that sends them."""

    def __init__(self, selector: ServingSelector) -> None:
        self.selector = selector
        self.context = zmq.Context()
        self.router = self.context.socket(zmq.ROUTER)
        self.dealer = self.context.socket(zmq.DEALER)
        self.router.bind("inproc://served")
        self.dealer.connect("inproc://served")
        self.taken: list[bytes] = []
        self.on_message: Callable[[bytes], None] = lambda body: None

    @property
    def has_message(self) -> bool:
        return bool(int(self.router.getsockopt(zmq.EVENTS)) & zmq.POLLIN)

    def turn(self) -> None:
        while self.has_message:
            body = self.router.recv_multipart(zmq.NOBLOCK)[-1]
            self.taken.append(body)
            self.on_message(body)


@pytest.fixture
def served() -> Iterator[Served]:
    found = Served(ServingSelector())
    yield found
    found.router.close(linger=0)
    found.dealer.close(linger=0)
    found.context.term()


def run(served: Served, main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    async def limited() -> None:
        served.selector.serve(int(served.router.getsockopt(zmq.FD)), served.turn)
        await asyncio.wait_for(main(), LIMIT_S)
        served.selector.stop_serving()

    with asyncio.Runner(loop_factory=lambda: ServingLoop(served.selector)) as runner:
        runner.run(limited())


async def until(done: Callable[[], bool]) -> None:
    while not done():
        await asyncio.sleep(0.01)


def test_messages_are_taken_while_asyncio_waits(served: Served) -> None:
    async def main() -> None:
        served.dealer.send(b"one")
        await until(lambda: served.taken == [b"one"])
        served.dealer.send(b"two")
        await until(lambda: served.taken == [b"one", b"two"])

    run(served, main)


def test_a_message_is_taken_though_a_callback_took_its_sign_away(served: Served) -> None:
    """Every call on a ZeroMQ socket may empty the descriptor that tells of messages."""
    news = asyncio.Event()
    served.on_message = lambda body: news.set()

    async def main() -> None:
        await asyncio.sleep(0.05)
        served.dealer.send(b"one")
        end = time.monotonic() + LIMIT_S
        while not served.has_message:
            assert time.monotonic() < end
        await news.wait()  # no timer comes to help

    run(served, main)


@contextmanager
def stream(served: Served) -> Iterator[None]:
    """A message every millisecond, from another thread."""
    stopped = threading.Event()

    def send() -> None:
        end = time.monotonic() + LIMIT_S  # then a loop that looks at nothing else is done, too
        while not stopped.wait(0.001) and time.monotonic() < end:
            served.dealer.send(b"again")

    thread = threading.Thread(target=send)
    thread.start()
    yield
    stopped.set()
    thread.join()


def test_a_stream_of_messages_does_not_hold_up_timers(served: Served) -> None:
    async def main() -> None:
        start = time.monotonic()
        await asyncio.sleep(0.2)
        assert time.monotonic() - start < SOON_S
        assert len(served.taken) > 10

    with stream(served):
        run(served, main)


def test_a_stream_of_messages_does_not_hold_up_other_descriptors(served: Served) -> None:
    read_end, write_end = os.pipe()
    heard = asyncio.Event()

    async def main() -> None:
        asyncio.get_running_loop().add_reader(read_end, heard.set)
        threading.Timer(0.1, os.write, (write_end, b"x")).start()
        start = time.monotonic()
        await heard.wait()
        assert time.monotonic() - start < SOON_S

    with stream(served):
        run(served, main)
    os.close(read_end)
    os.close(write_end)


def test_what_a_turn_leaves_for_later_is_done_at_once(served: Served) -> None:
    async def main() -> None:
        loop, done = asyncio.get_running_loop(), asyncio.Event()
        served.on_message = lambda body: None if done.is_set() else leave_it(loop, done)
        start = time.monotonic()
        threading.Timer(0.1, served.dealer.send, (b"one",)).start()
        await done.wait()
        assert time.monotonic() - start < SOON_S

    run(served, main)


def leave_it(loop: asyncio.AbstractEventLoop, done: asyncio.Event) -> None:
    loop.call_soon(done.set)
