"""Sessions of the daemon before this one: watched until each has resumed or its process is dead.

the table of sessions ──reopen──► quarantined ──resume──► declares ──done──► as any other
                                      │  the grace ends
                                      ▼
                                   fenced: quarantined until its process is proven dead
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

import structlog

from kvd.arguments import Arguments
from kvd.daemon import Attachment, Daemon, Pool
from kvd.metadata import SessionEntry
from kvd.process import Process, start_ticks
from kvd.recovery import Recovery
from kvd.report_parts import Result
from kvd_shared.errors import BadRequest, NotAllowed, PoolLost, SessionEnded
from kvd_shared.refs import REF_BYTES, TOKEN_BYTES
from kvd_shared.resume import ResumeRequest
from kvd_shared.verbs import MAX_DECLARED

log = structlog.get_logger()


def reopen(daemon: Daemon, now: float, grace_s: float) -> None:
    """List every session that the pools' metadata has. Those whose process lives have `grace_s`
    from now on to resume."""
    for pool, recovery in recoveries(daemon):
        recovery.grace_until_s = now + grace_s
        for entry in [*recovery.waiting.values(), *recovery.ended.values()]:
            session = pool.cache.sessions[entry.id]
            process = found_again(entry)
            is_dead = process is None
            if is_dead:
                log.info("session.died", session=entry.id, name=entry.process.name,
                         pid=entry.process.pid, held_pages=session.num_held_pages,
                         when="without a daemon")  # fmt: skip
            attachment = Attachment(
                entry.id,
                b"",
                pool.cache.meta.header.epoch,
                entry.process.role,
                entry.process.name,
                process or _of(entry),
                now,
                pool,
                session,
                ended_s=now,
                dead_s=now if is_dead else None,
            )
            daemon.reopened(attachment, entry.process.token_digest)


def recoveries(daemon: Daemon) -> Iterator[tuple[Pool, Recovery]]:
    for pool in daemon.pools.values():
        if pool.recovery is not None:
            yield pool, pool.recovery


def found_again(entry: SessionEntry) -> Process | None:
    """The process that the entry names, if it still is that one; None: it is dead.

    Where the daemon may not look (it has no descriptor left, say), the process cannot be watched
    and has no pidfd: it counts as alive.
    """
    process = _of(entry)
    try:
        process.pidfd = os.pidfd_open(process.pid)
        is_same = start_ticks(process.pid) == process.start_ticks
    except OSError as e:
        if e.errno in (errno.ESRCH, errno.ENOENT, errno.EINVAL):  # EINVAL: some thread's id now
            process.close()
            return None
        log.error("session.unwatched", session=entry.id, pid=process.pid, error=str(e),
                  effect="what it holds comes back after another restart")  # fmt: skip
        return process
    # Alive after its start time was read, so that was its own and no successor's.
    if is_same and not process.is_dead:
        return process
    process.close()
    return None


def _of(entry: SessionEntry) -> Process:
    who = entry.process
    return Process(pid=who.pid, uid=who.uid, gid=who.gid, start_ticks=who.start_time)


def admitted(daemon: Daemon, request: ResumeRequest, process: Process) -> Attachment:
    """The session that the process may resume. Changes nothing.

    Raises NotAllowed, PoolLost (the memory it knows is not this daemon's), SessionEnded (fenced,
    over, or never there).
    """
    daemon.access.check("worker", process)
    pool = next((p for p in daemon.pools.values() if p.pool_id == request.pool_id), None)
    if pool is None:
        raise PoolLost(
            f"this daemon has no pool {request.pool_id}: it started cold; unmap, attach again"
        )
    if pool.recovery is None:
        raise SessionEnded("this daemon has not restarted: nothing to resume; attach again")
    attachment = daemon.awaited(request.token)
    if attachment is None or attachment.pool is not pool:
        raise SessionEnded("no session of this token waits to be resumed: attach again")
    known = attachment.process
    if request.pid != process.pid or (process.pid, process.uid, process.start_ticks) != (
        known.pid,
        known.uid,
        known.start_ticks,
    ):
        raise NotAllowed(
            f"session {attachment.id} belongs to process {known.pid} of user {known.uid}, and "
            f"process {process.pid} of user {process.uid} asks: each process attaches by itself",
            reason="other_process",
            session=attachment.id,
        )
    if attachment.id not in pool.recovery.waiting:
        raise SessionEnded(f"session {attachment.id} is over, or was fenced: attach again")
    if request.epoch >= attachment.epoch:
        raise SessionEnded(
            f"epoch {request.epoch} of session {attachment.id} is not before this daemon's, "
            f"{attachment.epoch}: attach again"
        )
    return attachment


def resume(daemon: Daemon, attachment: Attachment, token: bytes, now: float) -> None:
    """What `admitted` has admitted goes on. It is answered under its token from now on."""
    assert attachment.pool is not None and attachment.pool.recovery is not None
    attachment.pool.recovery.resume(attachment.id)
    daemon.resumed(attachment, token, now)


def declare(attachment: Attachment, args: Arguments, now: float) -> Result:
    """The operation: these pages are held, so often each."""
    refs, counts = args.array("refs", REF_BYTES), args.array("counts", TOKEN_BYTES)
    done = args.flag("done")
    args.done()
    if len(refs) > MAX_DECLARED * REF_BYTES:
        raise BadRequest(
            f"declare: {len(refs) // REF_BYTES} pages: at most {MAX_DECLARED} in one call"
        )
    pool, session = attachment.pool, attachment.session
    if pool is None or session is None or not pool.recovery or not attachment.declaring:
        raise BadRequest(f"session {attachment.id} is not resuming: nothing to declare")
    refused = pool.recovery.declare(session, refs, counts, done, now)
    if done:
        attachment.declaring = False
        log.info("session.resumed", session=attachment.id, name=attachment.name,
                 pid=attachment.process.pid, held_pages=session.num_held_pages)  # fmt: skip
    return {"refused": refused}


def tick(daemon: Daemon, now: float) -> None:
    """To be called about twice a second: whoever has not resumed in time is fenced."""
    for pool, recovery in recoveries(daemon):
        fenced = recovery.tick(now)
        if not fenced:
            continue
        log.warning("sessions.fenced", pool=pool.name, sessions=fenced,
                    why="they did not resume in time")  # fmt: skip
        for session_id in fenced:
            attachment = daemon.attachments.get(session_id)
            if attachment is not None:  # one that was declaring has not ended yet
                daemon.end_session(attachment, "fenced", now)
