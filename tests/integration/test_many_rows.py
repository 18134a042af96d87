"""Requests that are done in slices, and what their peer sends behind them."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest

from kvd.operations import CALLS_A_SLICE, ROWS_A_SLICE
from kvd_shared import verbs
from kvd_shared.async_client import AsyncKvdClient
from kvd_shared.errors import BadRequest
from kvd_shared.namespace import Namespace
from tests.daemon import running_daemon

SPACE = Namespace(model="m")
PAGE = 16
ROWS = ROWS_A_SLICE + 70
NOBODYS = 10**9


def test_rows_of_every_slice_are_answered_in_their_places(tmp_path: Path) -> None:
    """As many sequences fill the same page at once: the first one's is everybody's then. One row in
    the second slice names no sequence."""
    with running_daemon(tmp_path, page_size=PAGE, num_pages=2 * ROWS) as daemon:
        with daemon.attach("worker") as worker:
            opened = [verbs.open_sequence(SPACE, range(PAGE)) for _ in range(ROWS)]
            handles = [handle for handle, _ in worker.call(verbs.step(opened))]
            first_page = worker.call(verbs.extend(handles[:1], [PAGE], [0], []))
            assert first_page.status == ["OK"]

            odd = ROWS_A_SLICE + 5
            rows = [*handles[1:odd], NOBODYS, *handles[odd:]]
            counts = [1] * ROWS
            grown = worker.call(verbs.extend(rows, [PAGE] * ROWS, counts, range(ROWS)))
            at = rows.index(NOBODYS)
            assert [row for row, status in enumerate(grown.status) if status != "OK"] == [at]
            assert grown.status[at] == "UNKNOWN_HANDLE"
            others = [row for row in range(ROWS) if row != at]
            assert grown.num_new.tolist() == [int(row != at) for row in range(ROWS)]
            assert len(set(grown.refs.tolist())) == ROWS - 1
            assert grown.swap_rows.tolist() == others
            assert not grown.swap_places.any()
            assert len(set(grown.swap_refs.tolist())) == 1

            with pytest.raises(BadRequest, match="as many"):
                worker.call(verbs.extend(rows, [PAGE] * ROWS, counts, range(ROWS - 1)))
            worker.call(verbs.close_sequences(handles))
        daemon.check()
        assert daemon.counts()["free"] == 2 * ROWS - 1


async def test_what_comes_behind_a_long_step_is_done_behind_it(tmp_path: Path) -> None:
    """Requests of one peer are answered in the order sent, also behind a long one."""
    calls = 40 * CALLS_A_SLICE
    done: list[str] = []
    with running_daemon(tmp_path, page_size=PAGE, num_pages=calls) as daemon:
        async with await AsyncKvdClient.attach(daemon.socket_dir, name="one") as client:

            async def step() -> None:
                taken = await client.call(verbs.step([verbs.allocate(1)] * calls))
                assert len({int(refs[0]) for refs in taken}) == calls
                done.append("step")

            async def ask() -> None:
                with pytest.raises(BadRequest, match="no tokens"):
                    await client.call(verbs.probe(SPACE, np.empty(0)))
                done.append("behind it")

            await asyncio.gather(step(), ask())
    assert done == ["step", "behind it"]
