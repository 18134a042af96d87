"""The lease socket's daemon side: who may attach, and the proof that a process is dead.

A connection's end of file ends its session: nothing more is answered under it. Its pages come back
only when the process is proven dead (its pidfd becomes readable), because a mapping cannot be
revoked: until then the process may still read and write them.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import time
from pathlib import Path

import msgpack
import structlog

from kvd.daemon import Attachment, Daemon
from kvd_shared.errors import Busy, KvdError, NotAllowed, TooLarge, error_to_wire
from kvd_shared.lease import LEASE_SOCKET, AttachRequest, accepted, peer_credentials
from kvd_shared.wire import MAX_ATTACH_BYTES, PROTOCOL_VERSION

HANDSHAKE_TIMEOUT_S = 5.0
ACCEPT_PAUSE_S = 0.1  # when no connection can be had, which waiting ones keep asking for
BACKLOG = 128

log = structlog.get_logger()


class LeaseServer:
    """Listens on `lease.sock`; owns one connection and one pidfd for each attachment."""

    def __init__(self, daemon: Daemon, socket_dir: Path, loop: asyncio.AbstractEventLoop) -> None:
        self._daemon, self._loop = daemon, loop
        self._path = socket_dir / LEASE_SOCKET
        self._path.unlink(missing_ok=True)  # a dead daemon's: the lock file says that it is
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(os.fspath(self._path))
        self._path.chmod(0o660)
        self._listener.listen(BACKLOG)
        self._listener.setblocking(False)
        self._connections: set[socket.socket] = set()
        self._pidfds: dict[int, int] = {}  # by attachment, while its death is awaited
        daemon.gone = self._forget_pidfd
        self._listen()

    def close(self) -> None:
        """Hang up on everyone, which tells them that the daemon is gone."""
        self._loop.remove_reader(self._listener)
        self._listener.close()
        self._path.unlink(missing_ok=True)
        for connection in list(self._connections):
            self._hang_up(connection)
        for pidfd in self._pidfds.values():
            self._loop.remove_reader(pidfd)
            os.close(pidfd)

    def _listen(self) -> None:
        if self._listener.fileno() >= 0:  # not closed during a pause
            self._loop.add_reader(self._listener, self._accept)

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError as e:
            log.warning("lease.accept_failed", error=str(e))
            self._loop.remove_reader(self._listener)
            self._loop.call_later(ACCEPT_PAUSE_S, self._listen)
            return
        connection.setblocking(False)
        self._connections.add(connection)
        late = self._loop.call_later(HANDSHAKE_TIMEOUT_S, self._hang_up, connection)
        self._loop.add_reader(connection, self._handshake, connection, late)

    def _handshake(self, connection: socket.socket, late: asyncio.TimerHandle) -> None:
        """The first packet has come, or the peer has gone."""
        late.cancel()
        self._loop.remove_reader(connection)
        try:
            raw, _, flags, _ = connection.recvmsg(MAX_ATTACH_BYTES)
        except OSError:
            raw, flags = b"", 0
        if not raw:
            self._hang_up(connection)
            return
        try:
            if flags & socket.MSG_TRUNC:
                raise TooLarge(f"an attach packet is at most {MAX_ATTACH_BYTES} bytes")
            self._admit(connection, raw)
        except KvdError as e:
            log.warning("attach.refused", code=e.code, reason=e.message)
            reply = msgpack.packb({"v": PROTOCOL_VERSION, "error": error_to_wire(e)})
            self._send(connection, reply, [])
            self._hang_up(connection)

    def _admit(self, connection: socket.socket, raw: bytes) -> None:
        request = AttachRequest.from_wire(raw)
        pid, uid, _ = peer_credentials(connection)
        attachment = self._daemon.attach(request, pid, uid, time.monotonic())
        try:
            pidfd = os.pidfd_open(pid)
        except OSError as e:
            self._daemon.dead(attachment, time.monotonic())
            if e.errno in (errno.EMFILE, errno.ENFILE):
                raise Busy("the daemon has no file descriptor left: attach again later") from e
            raise NotAllowed(f"process {pid} cannot be watched: {e.strerror}") from e
        self._pidfds[attachment.id] = pidfd
        self._loop.add_reader(pidfd, self._died, attachment, connection)
        self._loop.add_reader(connection, self._talked, attachment, connection)
        pool = attachment.pool
        reply = accepted(attachment.id, attachment.token, pool.offer() if pool else None)
        log.info("session.attached", session=attachment.id, name=attachment.name,
                 role=attachment.role, pid=pid, uid=uid)  # fmt: skip
        if not self._send(connection, reply, list(pool.memory.fds) if pool else []):
            # It was not handed the pool, so it has nothing to be fenced from.
            self._daemon.dead(attachment, time.monotonic())
            self._end(attachment, connection)

    def _send(self, connection: socket.socket, reply: bytes, fds: list[int]) -> bool:
        try:
            socket.send_fds(connection, [reply], fds)
        except OSError as e:
            log.warning("lease.send_failed", error=str(e))
            return False
        return True

    def _talked(self, attachment: Attachment, connection: socket.socket) -> None:
        """Nothing is ever said after the attach: this is end of file, or a breach."""
        try:
            if connection.recv(1):
                log.warning("lease.unexpected_packet", session=attachment.id)
        except BlockingIOError:
            return
        except OSError:
            pass  # a reset ends the session as an end of file does
        self._end(attachment, connection)

    def _end(self, attachment: Attachment, connection: socket.socket) -> None:
        if attachment.id in self._daemon.attachments:
            held = attachment.session.num_held_pages if attachment.session else 0
            log.info("session.ended", session=attachment.id, name=attachment.name, held_pages=held)
        self._daemon.end(attachment)
        self._hang_up(connection)

    def _died(self, attachment: Attachment, connection: socket.socket) -> None:
        if attachment.id in self._daemon.attachments:
            held = attachment.session.num_held_pages if attachment.session else 0
            log.info("session.died", session=attachment.id, name=attachment.name,
                     pid=attachment.pid, held_pages=held)  # fmt: skip
        self._daemon.dead(attachment, time.monotonic())
        self._hang_up(connection)  # a forked child can have it still

    def _forget_pidfd(self, attachment: Attachment) -> None:
        pidfd = self._pidfds.pop(attachment.id, None)
        if pidfd is not None:
            self._loop.remove_reader(pidfd)
            os.close(pidfd)

    def _hang_up(self, connection: socket.socket) -> None:
        if connection in self._connections:
            self._connections.discard(connection)
            self._loop.remove_reader(connection)
            connection.close()
