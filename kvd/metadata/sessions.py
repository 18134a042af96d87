"""The attached processes, as a restarted daemon has to know them, and as they see themselves.

Workers map this table read-only: a worker goes on only while the word of its entry is the one it
was told when it attached (`SessionTable.live_word`), which is one load.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvd.metadata.checksum import Words
from kvd.metadata.failpoints import FAILPOINTS
from kvd.metadata.page_states import MAX_SESSION
from kvd.metadata.table import Table
from kvd_shared.errors import OverLimit

if TYPE_CHECKING:
    from kvd.metadata.header import Header

SESSION_BYTES = 256
# States: far apart from each other in bits, above the session's id in one word.
LIVE, ENDED, FENCED = 0x4C49_5645, 0x454E_4421, 0x9F63_A0D7
_WORD = 1  # of an entry: state and id
_BODY = struct.Struct("<QQIIII16s32s160s")  # behind that word; a whole number of words
_DIGEST_BYTES, _NAME_BYTES, _ROLE_BYTES = 32, 160, 16


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessEntry:
    """Who is behind a session. `start_time`: field 22 of /proc/PID/stat, so that another process
    with the same pid is not taken for it."""

    token_digest: bytes  # sha256 of the session's token
    pid: int
    start_time: int
    uid: int
    gid: int
    name: str  # cut to 160 bytes
    role: str  # cut to 16 bytes


@dataclass(frozen=True, slots=True)
class SessionEntry:
    id: int
    state: int  # LIVE, ENDED or FENCED
    process: ProcessEntry


class SessionTable:
    """Invariant: a session whose pages are its own has an entry, from before the first of them to
    after the last. Sessions without a process (tickets, operators) have none, and no such pages."""

    __slots__ = ("_header", "_slots", "_table", "offset")

    def __init__(self, words: Words, offset: int, header: Header) -> None:
        """`offset`: of the table in the whole metadata."""
        self.offset = offset
        self._header = header
        self._table = Table("sessions", words)
        self._slots: dict[int, int] = {}

    def opened(self, session_id: int, process: ProcessEntry) -> None:
        """Raises OverLimit while the table is full, and has changed nothing."""
        assert 0 < session_id < MAX_SESSION and session_id not in self._slots
        slot = self._table.take()
        if slot < 0:
            most = len(self._table.words)
            raise OverLimit(
                f"{most} sessions are recorded, as many as can be: end one first, or wait until "
                "what a dead one held has come back",
                limit="recorded_sessions",
                value=most + 1,
                most=most,
            )
        if FAILPOINTS.armed:
            FAILPOINTS.hit("session_opened.before_next_id")
        self._header.next_session_id = session_id + 1
        if FAILPOINTS.armed:
            FAILPOINTS.hit("session_opened.before_body")
        self._table.words[slot, _WORD] = LIVE << 32 | session_id
        # Sealed is what never changes. The word does, and each state of it is a check by itself.
        seal = self._table.write(slot, _pack(session_id, process), _WORD + 1)
        if FAILPOINTS.armed:
            FAILPOINTS.hit("session_opened.before_seal")
        self._table.seal(slot, seal)
        if FAILPOINTS.armed:
            FAILPOINTS.hit("session_opened.done")
        self._slots[session_id] = slot

    def ended(self, session_id: int) -> None:
        """Its requests are refused from now on. Sessions without an entry are not recorded."""
        self._store_state(session_id, ENDED)

    def fenced(self, session_id: int) -> None:
        """What it reads from now on must not be used: pages that it held are another's."""
        self._store_state(session_id, FENCED)

    def gone(self, session_id: int) -> None:
        """Nothing in the pool is its own any more."""
        slot = self._slots.pop(session_id, None)
        if slot is None:
            return
        if FAILPOINTS.armed:
            FAILPOINTS.hit("session_gone.before_seal")
        self._table.unseal(slot)
        if FAILPOINTS.armed:
            FAILPOINTS.hit("session_gone.before_word")
        self._table.words[slot, _WORD] = 0
        if FAILPOINTS.armed:
            FAILPOINTS.hit("session_gone.done")
        self._table.release(slot)

    def state_offset(self, session_id: int) -> int:
        """Where in the metadata the session's word is; 8 bytes."""
        return self.offset + self._slots[session_id] * SESSION_BYTES + _WORD * 8

    @staticmethod
    def live_word(session_id: int) -> int:
        """What stands there while the session may go on."""
        return LIVE << 32 | session_id

    def load(self) -> dict[int, SessionEntry]:
        """The sessions by id. Raises ColdStart."""
        found: dict[int, SessionEntry] = {}
        self._slots.clear()
        for slot in self._table.sealed_slots():
            word = int(self._table.words[slot, _WORD])
            body = self._table.body(slot, _BODY.size, _WORD + 1)
            self._table.check_seal(slot, body)
            session_id, process = _unpack(body)
            if word & 0xFFFF_FFFF != session_id or word >> 32 not in (LIVE, ENDED, FENCED):
                raise self._table.doubt(slot, f"state {word:#x} of session {session_id}")
            if session_id in found or not 0 < session_id < self._header.next_session_id:
                raise self._table.doubt(slot, f"session {session_id} cannot be there")
            found[session_id] = SessionEntry(session_id, word >> 32, process)
            self._slots[session_id] = slot
        return found

    def _store_state(self, session_id: int, state: int) -> None:
        slot = self._slots.get(session_id)
        if slot is None:
            return
        if FAILPOINTS.armed:
            FAILPOINTS.hit("session_state.before_word")
        self._table.words[slot, _WORD] = state << 32 | session_id
        if FAILPOINTS.armed:
            FAILPOINTS.hit("session_state.done")


def _pack(session_id: int, process: ProcessEntry) -> bytes:
    assert len(process.token_digest) == _DIGEST_BYTES
    return _BODY.pack(
        session_id,
        process.start_time,
        process.pid,
        process.uid,
        process.gid,
        0,
        process.role.encode()[:_ROLE_BYTES],
        process.token_digest,
        process.name.encode()[:_NAME_BYTES],
    )


def _unpack(body: bytes) -> tuple[int, ProcessEntry]:
    session_id, start_time, pid, uid, gid, _, role, digest, name = _BODY.unpack(body)
    return session_id, ProcessEntry(
        token_digest=digest,
        pid=pid,
        start_time=start_time,
        uid=uid,
        gid=gid,
        name=name.rstrip(b"\0").decode("utf-8", "ignore"),
        role=role.rstrip(b"\0").decode("utf-8", "ignore"),
    )
