"""`python -m tests.chaos.flooder MODE SOCKET_DIR`: a client that has no consideration for others.

It goes on until its stdin closes, and then says in a line of JSON how many messages it has sent and
how many answers it has had.

flood    small requests as fast as they are taken, answers read
heavy    the same with prompts of 32,768 tokens
huge     the same with the longest prompts that there are, 1,048,576 tokens
deaf     requests with long answers (page maps), of which none is ever read
garbage  messages that make no sense, answers read
idle     300 connections to the lease socket that say nothing, anew each time they are closed
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import zmq

from kvd_shared import verbs
from kvd_shared.client import KvdClient
from kvd_shared.lease import LEASE_SOCKET, RPC_SOCKET
from kvd_shared.namespace import Namespace
from kvd_shared.rpc import RpcCodec

NAMESPACE = Namespace(model="flood")
HEAVY_TOKENS, HUGE_TOKENS = 32_768, 1_048_576
IDLE_CONNECTIONS = 300
BURST = 200  # messages between two looks at whether it is over


class Flooder:
    def __init__(self, mode: str, socket_dir: Path) -> None:
        self._mode, self._dir = mode, socket_dir
        self._over = select.poll()
        self._over.register(0, select.POLLIN | select.POLLHUP)
        self.sent = self.answered = 0

    def run(self) -> None:
        if self._mode == "idle":
            self._idle()
            return
        role = "admin" if self._mode == "deaf" else "worker"
        with KvdClient.attach(self._dir, name="flooder", role=role) as client:
            print("ready", flush=True)
            self._flood(client._codec)

    def _flood(self, codec: RpcCodec) -> None:
        context = zmq.Context()
        dealer = context.socket(zmq.DEALER)
        dealer.setsockopt(zmq.LINGER, 0)
        dealer.connect(f"ipc://{self._dir / RPC_SOCKET}")
        messages = self._messages(codec)
        while not self._over.poll(0):
            for _ in range(BURST):
                try:
                    dealer.send_multipart(next(messages), zmq.NOBLOCK)
                    self.sent += 1
                except zmq.Again:
                    dealer.poll(10, zmq.POLLOUT if self._mode == "deaf" else zmq.POLLIN)
                    break
            while self._mode != "deaf" and dealer.poll(0):
                dealer.recv_multipart()
                self.answered += 1
        dealer.close()
        context.term()

    def _messages(self, codec: RpcCodec) -> Iterator[list[bytes]]:
        tokens = HUGE_TOKENS if self._mode == "huge" else HEAVY_TOKENS
        prompt = np.arange(tokens, dtype=np.int32)
        while True:
            match self._mode:
                case "garbage":
                    yield [os.urandom(40)]
                case "deaf":
                    yield codec.request(verbs.pages())[1]
                case "heavy" | "huge":
                    yield codec.request(verbs.probe(NAMESPACE, prompt))[1]
                case _:
                    yield codec.request(verbs.probe(NAMESPACE, [1, 2, 3]))[1]

    def _idle(self) -> None:
        connections: list[socket.socket] = []
        print("ready", flush=True)
        while not self._over.poll(20):
            for connection in list(connections):
                if select.select([connection], [], [], 0)[0]:  # closed by the daemon
                    connection.close()
                    connections.remove(connection)
            while len(connections) < IDLE_CONNECTIONS:
                connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                connection.setblocking(False)
                try:
                    connection.connect(os.fspath(self._dir / LEASE_SOCKET))
                except OSError:  # the backlog is full
                    connection.close()
                    break
                connections.append(connection)
                self.sent += 1


def main() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    flooder = Flooder(sys.argv[1], Path(sys.argv[2]))
    flooder.run()
    print(json.dumps({"sent": flooder.sent, "answered": flooder.answered}), flush=True)


if __name__ == "__main__":
    main()
