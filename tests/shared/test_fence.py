"""One word of the daemon's memory, read-only."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator

import pytest

from kvd.metadata import Geometry, Metadata, ProcessEntry, create_metadata
from kvd.read_only_fd import read_only
from kvd_shared.fence import Fence
from kvd_shared.lease import FenceOffer
from kvd_shared.mapping import BadPoolMemory


@pytest.fixture
def meta() -> Iterator[Metadata]:
    made = create_metadata(Geometry(num_pages=8, page_size=4), "0" * 16)
    for session in range(1, 40):  # on the second memory page of the table, too
        made.sessions.opened(
            session,
            ProcessEntry(token_digest=bytes(32), pid=1, start_time=0, uid=0, gid=0, name="w",
                         role="worker"),
        )  # fmt: skip
    yield made
    made.close()


def fence_of(meta: Metadata, session: int) -> Fence:
    fd = read_only(meta.fd)
    offer = FenceOffer(meta.sessions.state_offset(session), meta.sessions.live_word(session))
    try:
        return Fence(fd, offer)
    finally:
        os.close(fd)


@pytest.mark.parametrize("session", [1, 15, 16, 17, 39])
@pytest.mark.parametrize("end", ["ended", "fenced", "gone"])
def test_it_is_up_for_its_own_session_alone(meta: Metadata, session: int, end: str) -> None:
    fence, others = fence_of(meta, session), fence_of(meta, 2)
    assert not fence.is_up
    getattr(meta.sessions, end)(session)
    assert fence.is_up
    assert not others.is_up
    fence.close()
    fence.close()
    assert fence.is_up


def test_it_is_up_once_closed(meta: Metadata) -> None:
    fence = fence_of(meta, 3)
    fence.close()
    assert fence.is_up


@pytest.mark.parametrize(("offset", "why"), [(1 << 40, "no word"), (4099, "no word"), (-8, "no")])
def test_a_word_that_is_not_there_is_refused(meta: Metadata, offset: int, why: str) -> None:
    with pytest.raises(BadPoolMemory, match=why):
        Fence(meta.fd, FenceOffer(offset, 1))


def test_memory_that_could_be_cut_is_refused() -> None:
    """Reading behind a cut is a SIGBUS."""
    fd = os.memfd_create("cut", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 4096)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW)
    with pytest.raises(BadPoolMemory, match="not sealed"):
        Fence(fd, FenceOffer(0, 1))
    os.close(fd)
    reading, writing = os.pipe()
    with pytest.raises(BadPoolMemory, match="no memfd"):
        Fence(reading, FenceOffer(0, 1))
    os.close(reading)
    os.close(writing)
