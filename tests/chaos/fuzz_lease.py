"""Faults on the lease socket, and raw bytes on the other one, where ZeroMQ expects its greeting."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from pathlib import Path
from random import Random

import msgpack

from kvd_shared.lease import LEASE_SOCKET, RPC_SOCKET
from kvd_shared.wire import MAX_ATTACH_BYTES, PROTOCOL_VERSION
from tests.chaos.fuzz_frames import HUGE, ODD
from tests.integration.mutated_frames import mutated

GEOMETRY = {"num_layers": 1, "num_kv_heads": 1, "head_dim": 8}
ZMTP_GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00NULL" + bytes(48)


class LeaseFaults:
    """One connection a fault. `accepted` has the tokens of those that came through: they are
    sessions of this process, to be detached."""

    def __init__(
        self,
        rng: Random,
        socket_dir: Path,
        other_token: bytes,
        resume: tuple[bytes, str, int] | None = None,
    ) -> None:
        """`resume`: token, pool and epoch of a session of this process that waits to be resumed."""
        self.accepted: list[bytes] = []
        self._resume = resume
        self._rng, self._dir, self._other = rng, socket_dir, other_token

    def one(self) -> str:
        """What came of it: "accepted", "hung up", or an error's code."""
        if self._rng.random() < 0.1:
            return self._raw_bytes()
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with connection:
            connection.settimeout(10.0)
            connection.connect(os.fspath(self._dir / LEASE_SOCKET))
            try:
                self._send(connection, self._packet())
                raw, fds, _, _ = socket.recv_fds(connection, MAX_ATTACH_BYTES, 64)
            except (BrokenPipeError, ConnectionResetError):
                return "hung up"
            for fd in fds:
                os.close(fd)
            answer = msgpack.unpackb(raw) if raw else {}
            if "token" in answer:
                self.accepted.append(answer["token"])
                if self._rng.random() < 0.3:
                    with suppress(OSError):  # a breach: nothing is said after the attach
                        connection.send(self._rng.randbytes(self._rng.randrange(1, 99)))
                return "accepted"
            if "session" in answer:
                return "resumed"
            return str(answer["error"]["code"]) if answer else "hung up"

    def _send(self, connection: socket.socket, packet: bytes) -> None:
        if self._rng.random() < 0.1:  # with fds that nobody asked for
            socket.send_fds(connection, [packet], [connection.fileno()] * self._rng.randrange(1, 9))
        else:
            connection.send(packet)

    def _packet(self) -> bytes:
        rng = self._rng
        fields = {"v": PROTOCOL_VERSION, "op": "attach", "role": rng.choice(["worker", "admin"]),
                  "name": "fuzz", "pid": os.getpid(), "pool": None, "geometry": GEOMETRY,
                  "model": None}  # fmt: skip
        if self._resume is not None:
            token, pool_id, epoch = self._resume
            fields = {"v": PROTOCOL_VERSION, "op": "resume", "pid": os.getpid(), "token": token,
                      "pool_id": pool_id, "epoch": epoch}  # fmt: skip
        elif rng.random() < 0.3:
            fields = {"v": PROTOCOL_VERSION, "op": "resume", "pid": os.getpid(),
                      "pool_id": rng.randbytes(8).hex(), "epoch": rng.choice([0, 1, 2, 2**63]),
                      "token": rng.choice([self._other, rng.randbytes(16)])}  # fmt: skip
        match rng.randrange(5):
            case 0:
                fields[rng.choice(list(fields))] = rng.choice(ODD)
            case 1:
                raw = bytearray(msgpack.packb(fields))
                at = rng.randrange(len(raw))
                raw[at : at + rng.randrange(6)] = rng.choice(HUGE)
                return bytes(raw)
            case 2:
                return rng.randbytes(
                    rng.choice([1, 8, 300, MAX_ATTACH_BYTES, 2 * MAX_ATTACH_BYTES])
                )
        whole: bytes = msgpack.packb(fields)
        return mutated(rng, [whole])[0] or b"\0"

    def _raw_bytes(self) -> str:
        """ZeroMQ's own framing, broken: its library has to refuse it."""
        rng = self._rng
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(10.0)
            connection.connect(os.fspath(self._dir / RPC_SOCKET))
            raw = bytearray(ZMTP_GREETING + rng.randbytes(rng.randrange(64)))
            for _ in range(rng.randrange(4)):
                raw[rng.randrange(len(raw))] = rng.randrange(256)
            with suppress(OSError):
                connection.send(raw[: rng.randrange(1, len(raw) + 1)])
        return "raw bytes"
