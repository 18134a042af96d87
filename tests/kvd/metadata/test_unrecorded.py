"""Memory that nobody keeps when the daemon ends is not recorded, and is used as any other."""

from __future__ import annotations

from kvd.cache import CacheManager
from kvd.cache_check import check_cache
from kvd.metadata import Geometry, Metadata, metadata_bytes
from kvd.metadata.page_states import FREE
from kvd_shared.namespace import Namespace
from tests.kvd.tokens import packed

PAGES, PAGE = 8, 2
NAMESPACE = Namespace(model="m")


def tokens(*ids: int) -> bytes:
    return b"".join(i.to_bytes(4, "little") for i in ids)


def test_nothing_is_stored_and_all_works() -> None:
    meta = Metadata.in_memory(PAGES, PAGE, recorded=False)
    cache = CacheManager(PAGES, PAGE, meta=meta)
    session = cache.open_session(1, "worker", 0.0)
    refs = cache.allocate(session, 4, None, 0.0)
    cache.publish(session, NAMESPACE, tokens(*range(8)), refs, None, 0.0)
    cache.free(session, refs, 1.0)
    check_cache(cache)
    assert cache.match(session, NAMESPACE, tokens(*range(9)), 2.0).refs == refs
    cache.free(session, refs, 2.0)
    evicted = cache.allocate(session, PAGES, None, 3.0)
    assert packed([0]) not in [evicted[i : i + 8] for i in range(0, len(evicted), 8)]
    check_cache(cache)
    assert set(meta.pages.owners().tolist()) == {FREE}
    assert meta.roots.num_unrecorded == 0  # nobody is to be warned


def test_it_takes_little_memory() -> None:
    size = Geometry(num_pages=100_000, page_size=16)
    without = Geometry(num_pages=100_000, page_size=16, recorded=False)
    assert metadata_bytes(without) < 40 * 100_000 < 140 * 100_000 < metadata_bytes(size)
