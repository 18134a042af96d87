"""The lease socket's daemon side: who may attach, and the proof that a process is dead.

A connection's end of file ends its session: nothing more is answered under it. Its pages come back
only when the process is proven dead (its pidfd becomes readable), because a mapping cannot be
revoked: until then the process may still read and write them.
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct
import time
from dataclasses import dataclass
from pathlib import Path

import msgpack
import structlog

from kvd import resume
from kvd.daemon import Attachment, Daemon, Pool
from kvd.process import Process, peer_process
from kvd.read_only_fd import read_only
from kvd.socket_files import made_private, share_with_group
from kvd_shared.errors import KvdError, NotAllowed, TooLarge, error_to_wire
from kvd_shared.lease import LEASE_SOCKET, AttachRequest, FenceOffer, accepted, peer_credentials
from kvd_shared.resume import ResumeRequest, resumed
from kvd_shared.wire import MAX_ATTACH_BYTES, PROTOCOL_VERSION, read_map

HANDSHAKE_TIMEOUT_S = 5.0
ACCEPT_PAUSE_S = 0.1  # when no connection can be had, which waiting ones keep asking for
BACKLOG = 128
# Room for the sender's credentials and for nothing else: fds that a peer sends are not taken.
CREDENTIALS = struct.Struct("3i")
ANCILLARY_BYTES = socket.CMSG_LEN(CREDENTIALS.size)

log = structlog.get_logger()


@dataclass(frozen=True, slots=True, kw_only=True)
class Fencing:
    """How long a session that has ended is waited for."""

    death_grace_s: float = 0.0  # from the proof of death to the return of the pages
    quarantine_alarm_s: float = 5.0  # from a session's end, while its process lives


class LeaseServer:
    """Listens on `lease.sock`; owns one connection for each attachment that has not ended."""

    def __init__(
        self,
        daemon: Daemon,
        socket_dir: Path,
        loop: asyncio.AbstractEventLoop,
        fencing: Fencing | None = None,
    ) -> None:
        self._daemon, self._loop = daemon, loop
        self._fencing = fencing or Fencing()
        self._path = socket_dir / LEASE_SOCKET
        self._path.unlink(missing_ok=True)  # a dead daemon's: the lock file says that it is
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # Accepted connections have it, too: the kernel adds to each packet who sent it.
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        with made_private():
            self._listener.bind(os.fspath(self._path))
        share_with_group(self._path)
        self._listener.listen(BACKLOG)
        self._listener.setblocking(False)
        self._connections: set[socket.socket] = set()
        self._connection_of: dict[int, socket.socket] = {}  # by attachment
        self._alarms: dict[int, asyncio.TimerHandle] = {}  # by attachment, while quarantined
        self._metadata: dict[str, int] = {}  # by pool: the fd that workers get, for reading only
        daemon.ended = self._ended
        daemon.gone = self._gone
        for attachment in list(daemon.attachments.values()):
            self._await(attachment)
        self._listen()

    def close(self) -> None:
        """Hang up on everyone, which tells them that the daemon is gone."""
        self._loop.remove_reader(self._listener)
        self._listener.close()
        self._path.unlink(missing_ok=True)
        for connection in list(self._connections):
            self._hang_up(connection)
        for alarm in self._alarms.values():
            alarm.cancel()
        for attachment in self._daemon.attachments.values():
            self._unwatch(attachment.process)
        for fd in self._metadata.values():
            os.close(fd)

    # --- attaching

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
            raw, ancillary, flags, _ = connection.recvmsg(MAX_ATTACH_BYTES, ANCILLARY_BYTES)
        except OSError:
            raw, ancillary, flags = b"", [], 0
        if not raw:
            self._hang_up(connection)
            return
        process: Process | None = None
        request: AttachRequest | ResumeRequest | None = None
        try:
            process = peer_process(connection)
            _check_sender(process, ancillary)
            if flags & socket.MSG_TRUNC:
                raise TooLarge(f"an attach packet is at most {MAX_ATTACH_BYTES} bytes")
            if read_map(raw).get("op") == "resume":
                request = ResumeRequest.from_wire(raw)
                self._resume(connection, request, process)
            else:
                request = AttachRequest.from_wire(raw)
                self._admit(connection, request, process)
        except KvdError as e:
            self._refuse(connection, e, process, request)

    def _admit(self, connection: socket.socket, request: AttachRequest, process: Process) -> None:
        attachment = self._daemon.attach(request, process, time.monotonic())
        self._watch(attachment, connection)
        pool, fds, fence = attachment.pool, list[int](), None
        if pool is not None:
            fds += pool.memory.fds
            if pool.cache.meta.fd >= 0:
                fds.append(self._metadata_fd(pool))
                sessions = pool.cache.meta.sessions
                fence = FenceOffer(
                    sessions.state_offset(attachment.id), sessions.live_word(attachment.id)
                )
        reply = accepted(
            attachment.id,
            attachment.token,
            attachment.epoch,
            pool.offer() if pool else None,
            fence,
        )
        log.info("session.attached", session=attachment.id, name=attachment.name,
                 role=attachment.role, pid=process.pid, uid=process.uid)  # fmt: skip
        if not self._send(connection, reply, fds):
            # It was not handed the pool, so it has nothing to be fenced from.
            self._daemon.dead(attachment, time.monotonic(), "unreachable")

    def _metadata_fd(self, pool: Pool) -> int:
        if pool.name not in self._metadata:
            self._metadata[pool.name] = read_only(pool.cache.meta.fd)
        return self._metadata[pool.name]

    def _resume(self, connection: socket.socket, request: ResumeRequest, process: Process) -> None:
        attachment = resume.admitted(self._daemon, request, process)
        now = time.monotonic()
        resume.resume(self._daemon, attachment, request.token, now)
        self._quiet(attachment)
        self._unwatch(attachment.process)  # the same one; this one's groups are known
        attachment.process = process
        self._watch(attachment, connection)
        log.info("session.resuming", session=attachment.id, name=attachment.name,
                 pid=process.pid, uid=process.uid, epoch=attachment.epoch)  # fmt: skip
        if not self._send(
            connection, resumed(attachment.id, attachment.epoch, request.pool_id), []
        ):
            self._daemon.end_session(attachment, "unreachable", now)

    def _watch(self, attachment: Attachment, connection: socket.socket) -> None:
        self._connection_of[attachment.id] = connection
        self._loop.add_reader(attachment.process.pidfd, self._died, attachment)
        self._loop.add_reader(connection, self._talked, attachment, connection)

    def _await(self, attachment: Attachment) -> None:
        """A session of the daemon before: its process may resume it, or be dead."""
        if attachment.dead_s is not None:
            self._release_behind_grace(attachment)
            return
        if attachment.process.pidfd >= 0:
            self._loop.add_reader(attachment.process.pidfd, self._died, attachment)
        wait_s = self._fencing.quarantine_alarm_s
        if attachment.pool and attachment.pool.recovery:
            wait_s += max(0.0, attachment.pool.recovery.grace_until_s - time.monotonic())
        self._alarms[attachment.id] = self._loop.call_later(wait_s, self._alarm, attachment)

    def _refuse(
        self,
        connection: socket.socket,
        error: KvdError,
        process: Process | None,
        request: AttachRequest | ResumeRequest | None,
    ) -> None:
        pid, uid, _ = peer_credentials(connection)
        self._daemon.refusals.note(
            error, channel="lease", uid=uid, pid=pid, role=request.role if request else None
        )
        if process is not None:
            process.close()
        reply = msgpack.packb({"v": PROTOCOL_VERSION, "error": error_to_wire(error)})
        self._send(connection, reply, [])
        self._hang_up(connection)

    def _send(self, connection: socket.socket, reply: bytes, fds: list[int]) -> bool:
        try:
            socket.send_fds(connection, [reply], fds)
        except OSError as e:
            log.warning("lease.send_failed", error=str(e))
            return False
        return True

    # --- the end of a session, and of its process

    def _talked(self, attachment: Attachment, connection: socket.socket) -> None:
        """Nothing is ever said after the attach: this is end of file, or a breach."""
        why = "hung_up"
        try:
            if connection.recv(1):
                why = "spoke"
                log.warning("lease.unexpected_packet", session=attachment.id)
        except BlockingIOError:
            return
        except OSError:
            pass  # a reset ends the session as an end of file does
        if attachment.ended:  # it has detached
            self._hang_up(connection)
        self._daemon.end_session(attachment, why, time.monotonic())

    def _ended(self, attachment: Attachment, why: str) -> None:
        """Of every session once, whatever ended it. Its process may live on."""
        log.info("session.ended", session=attachment.id, name=attachment.name,
                 pid=attachment.process.pid, why=why,
                 held_pages=attachment.num_held_pages)  # fmt: skip
        if why != "detached":  # who detaches hangs up, once it has read that it may
            self._hang_up(self._connection_of.get(attachment.id))
        self._alarms[attachment.id] = self._loop.call_later(
            self._fencing.quarantine_alarm_s, self._alarm, attachment
        )

    def _alarm(self, attachment: Attachment) -> None:
        if attachment.dead_s is not None:
            return
        self._daemon.quarantine_alarms += 1
        process = attachment.process
        log.warning(
            "session.quarantined",
            session=attachment.id,
            name=attachment.name,
            pid=process.pid,
            uid=process.uid,
            held_pages=attachment.num_held_pages,
            for_s=self._fencing.quarantine_alarm_s,
            remedy=f"its process lives and may still write: kvdctl sessions kill {attachment.id}",
        )

    def _died(self, attachment: Attachment) -> None:
        """The kernel's proof. A device may go on with what the process had begun: the grace."""
        now = time.monotonic()
        self._loop.remove_reader(attachment.process.pidfd)
        log.info("session.died", session=attachment.id, name=attachment.name,
                 pid=attachment.process.pid, held_pages=attachment.num_held_pages)  # fmt: skip
        attachment.dead_s = now
        self._daemon.end_session(attachment, "died", now)
        self._release_behind_grace(attachment)

    def _release_behind_grace(self, attachment: Attachment) -> None:
        if self._fencing.death_grace_s:
            self._loop.call_later(self._fencing.death_grace_s, self._release, attachment)
        else:
            self._release(attachment)

    def _release(self, attachment: Attachment) -> None:
        self._daemon.dead(attachment, time.monotonic())

    def _gone(self, attachment: Attachment) -> None:
        """Of every attachment once: nobody waits for its death any more."""
        self._quiet(attachment)
        self._connection_of.pop(attachment.id, None)
        self._unwatch(attachment.process)

    def _quiet(self, attachment: Attachment) -> None:
        if alarm := self._alarms.pop(attachment.id, None):
            alarm.cancel()

    def _unwatch(self, process: Process) -> None:
        if process.pidfd >= 0:
            self._loop.remove_reader(process.pidfd)
            process.close()

    def _hang_up(self, connection: socket.socket | None) -> None:
        if connection in self._connections:
            self._connections.discard(connection)
            self._loop.remove_reader(connection)
            connection.close()


def _check_sender(process: Process, ancillary: list[tuple[int, int, bytes]]) -> None:
    """The packet must be the connected process's own: a forked child, or whoever was handed the
    connection, attaches by itself. Raises NotAllowed."""
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_CREDENTIALS):
            pid, uid, _ = CREDENTIALS.unpack(data)
            if (pid, uid) == (process.pid, process.uid):
                return
            raise NotAllowed(
                f"process {process.pid} of user {process.uid} connected, and process {pid} of "
                f"user {uid} speaks: each process attaches by itself",
                reason="other_sender",
                connected=process.pid,
                sender=pid,
            )
    raise NotAllowed("the kernel does not say who sent this packet", reason="other_sender")
