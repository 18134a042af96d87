"""The clock of most caches here is an hour ahead, so that files made just now count as settled."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from kvd_shared import digest_file
from kvd_shared.digest_cache import DigestCache, default_cache_dir
from kvd_shared.model_folder import model_fingerprint

HOUR_NS = 3600 * 10**9


def later() -> int:
    return time.time_ns() + HOUR_NS


def num_read() -> int:
    """Bytes that this process has asked the kernel for."""
    found = re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())
    assert found
    return int(found[1])


def make_model(path: Path, *contents: bytes) -> Path:
    path.mkdir()
    (path / "config.json").write_text("{}")
    names = [f"model-{number}.safetensors" for number in range(len(contents))]
    for name, content in zip(names, contents, strict=True):
        (path / name).write_bytes(content)
    index = {"weight_map": {f"tensor {name}": name for name in names}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


def digest(file: Path, cache: DigestCache) -> tuple[bytes, bool]:
    """The file's digest by way of the cache, and whether the file was read for it."""
    read: list[bytes] = []

    def compute() -> bytes:
        read.append(file.read_bytes())
        return hashlib.sha256(read[0]).digest()

    fd = os.open(file, os.O_RDONLY)
    try:
        return cache.digest(fd, compute), bool(read)
    finally:
        os.close(fd)


def is_right(file: Path, cache: DigestCache) -> bool:
    return digest(file, cache)[0] == hashlib.sha256(file.read_bytes()).digest()


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    file = tmp_path / "weights"
    file.write_bytes(b"abc")
    return file


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "kvd"


def test_the_state_of_a_file_is_all_that_tells_its_content(weights: Path) -> None:
    with weights.open("rb") as stream:
        state = digest_file.FileState.of(stream.fileno())
    s = weights.stat()
    assert state == (s.st_dev, s.st_ino, 3, s.st_mtime_ns, s.st_ctime_ns)


def test_a_second_start_reads_no_weights(tmp_path: Path, place: Path) -> None:
    size = 3 << 20
    model = make_model(tmp_path / "model", bytes(size), b"x" * size)
    without = model_fingerprint(model)

    def start() -> tuple[str, int, list[tuple[int, int]]]:
        seen: list[tuple[int, int]] = []
        before = num_read()
        cache = DigestCache(place, later)
        found = model_fingerprint(model, lambda *progress: seen.append(progress), cache)
        return found, num_read() - before, seen

    first, read_first, _ = start()
    with capture_logs() as logs:
        second, read_second, seen = start()
    assert first == second == without
    assert read_first >= 2 * size
    assert read_second < 64 << 10  # config, index and cache
    assert seen == [(size, 2 * size), (2 * size, 2 * size)]
    (event,) = logs
    assert event["event"] == "digests.from_cache" and (event["files"], event["of"]) == (2, 2)


def test_only_the_changed_file_of_a_model_is_read(tmp_path: Path, place: Path) -> None:
    size = 3 << 20
    model = make_model(tmp_path / "model", bytes(size), b"x" * size)
    one = model_fingerprint(model, cache=DigestCache(place, later))
    (model / "model-1.safetensors").write_bytes(b"y" * size)
    before = num_read()
    two = model_fingerprint(model, cache=DigestCache(place, later))
    assert size <= num_read() - before < 1.5 * size
    assert two != one and two == model_fingerprint(model)


def test_a_file_is_known_by_its_inode_not_by_its_path(tmp_path: Path, place: Path) -> None:
    """As in Hugging Face's own cache, where a model folder is links to files elsewhere."""
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    (blobs / "weights").write_bytes(b"abc")
    digest(blobs / "weights", DigestCache(place, later))
    moved = blobs.rename(tmp_path / "moved") / "weights"
    linked = tmp_path / "link"
    linked.symlink_to(moved)
    cache = DigestCache(place, later)
    assert [digest(file, cache)[1] for file in (moved, linked)] == [False, False]
    copy = tmp_path / "copy"
    copy.write_bytes(moved.read_bytes())
    assert digest(copy, cache)[1]


def _touch(file: Path) -> None:
    os.utime(file)


def _append(file: Path) -> None:
    with file.open("ab") as stream:
        stream.write(b"d")


def _replace(file: Path) -> None:
    """Another file of the same size and mtime takes its name."""
    other = file.with_name("other")
    other.write_bytes(b"xyz")
    os.utime(other, ns=(file.stat().st_atime_ns, file.stat().st_mtime_ns))
    other.rename(file)


def _modify_and_restore_mtime(file: Path) -> None:
    before = file.stat()
    with file.open("r+b") as stream:
        stream.write(b"xyz")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (file.stat().st_mtime_ns, file.stat().st_size) == (before.st_mtime_ns, before.st_size)


@pytest.mark.parametrize("change", [_touch, _append, _replace, _modify_and_restore_mtime])
def test_a_file_that_may_have_changed_is_read_again(
    weights: Path, place: Path, change: Callable[[Path], None]
) -> None:
    digest(weights, DigestCache(place, later))
    assert digest(weights, DigestCache(place, later)) == (hashlib.sha256(b"abc").digest(), False)
    change(weights)
    cache = DigestCache(place, later)
    assert digest(weights, cache)[1]
    assert is_right(weights, cache) and cache.num_hits == 1  # what was read anew is known


def test_a_file_that_changed_within_two_seconds_is_not_trusted(weights: Path, place: Path) -> None:
    """A second change can leave the times as they are, where a file system's are coarse."""
    changed_ns = weights.stat().st_ctime_ns

    def at(seconds: float) -> DigestCache:
        return DigestCache(place, lambda: changed_ns + int(seconds * 1e9))

    digest(weights, at(2))
    assert not place.exists()
    digest(weights, at(2.1))
    assert digest(weights, at(2.1))[1] is False
    assert digest(weights, at(2))[1] is True  # the clock was set back


@pytest.mark.parametrize("mtime_ns", [0, 4 * 10**18])
def test_both_times_must_be_two_seconds_old(weights: Path, place: Path, mtime_ns: int) -> None:
    """An mtime can be set to anything: long ago with a change just now, or in the future."""
    os.utime(weights, ns=(0, mtime_ns))
    now_ns = weights.stat().st_ctime_ns + (10**9 if mtime_ns == 0 else HOUR_NS)
    for _ in range(2):
        assert digest(weights, DigestCache(place, lambda: now_ns))[1] is True
    assert not place.exists()


def test_the_two_seconds_are_counted_from_before_the_file_is_read(
    weights: Path, place: Path
) -> None:
    """A change in the middle of a long reading may leave the times as they are, too."""
    changed_ns = weights.stat().st_ctime_ns
    now_ns = [changed_ns + 10**9]
    cache = DigestCache(place, lambda: now_ns[0])
    fd = os.open(weights, os.O_RDONLY)

    def compute() -> bytes:
        now_ns[0] += 60 * 10**9
        return b"half old, half new".ljust(32)

    cache.digest(fd, compute)
    os.close(fd)
    assert is_right(weights, cache) and is_right(weights, DigestCache(place, later))


def test_a_file_that_changes_while_it_is_read_is_not_remembered(weights: Path, place: Path) -> None:
    cache = DigestCache(place, later)
    fd = os.open(weights, os.O_RDONLY)

    def compute() -> bytes:
        _append(weights)
        return b"half old, half new".ljust(32)

    cache.digest(fd, compute)
    os.close(fd)
    assert not place.exists()
    assert is_right(weights, cache)


def corrupt_digest(raw: bytes) -> bytes:
    at = raw.rindex(b" ") + 1
    return raw[:at] + (b"1" if raw[at : at + 1] == b"0" else b"0") + raw[at + 1 :]


@pytest.mark.parametrize(
    "damage",
    [
        corrupt_digest,
        lambda raw: b"",
        lambda raw: raw[:-10],
        lambda raw: raw + b"1 2 3\n",
        lambda raw: raw.replace(b"kvd-digests-1", b"kvd-digests-2"),
        lambda raw: os.urandom(500),
        lambda raw: b"\n" * (1 << 20),
    ],
    ids=["bit", "empty", "cut", "longer", "version", "noise", "huge"],
)
def test_a_damaged_cache_is_computed_again_and_the_log_says_so(
    weights: Path, place: Path, damage: Callable[[bytes], bytes]
) -> None:
    digest(weights, DigestCache(place, later))
    file = place / "digests"
    file.write_bytes(damage(file.read_bytes()))
    with capture_logs() as logs:
        cache = DigestCache(place, later)
    assert [(e["event"], e["log_level"]) for e in logs] == [("digests.cache_damaged", "warning")]
    assert digest(weights, cache) == (hashlib.sha256(b"abc").digest(), True)
    with capture_logs() as logs:
        assert digest(weights, DigestCache(place, later))[1] is False
    assert logs == []


def off_reason(weights: Path, place: Path | None) -> str:
    """Uses a cache that must do nothing but say why, once."""
    with capture_logs() as logs:
        cache = DigestCache(place, later)
        reads = [digest(weights, cache) for _ in range(2)]
    assert reads == [(hashlib.sha256(b"abc").digest(), True)] * 2
    (event,) = logs
    assert (event["event"], event["log_level"]) == ("digests.cache_off", "warning")
    why: str = event["why"]
    return why


def test_a_cache_that_somebody_else_could_have_written_is_refused(
    weights: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest(weights, DigestCache(place, later))
    for path, what in ((place, "the directory"), (place / "digests", "the file digests")):
        mode = path.stat().st_mode
        for unsafe in (0o020, 0o002):
            path.chmod(mode | unsafe)
            assert f"{what} has mode" in off_reason(weights, place)
        path.chmod(mode)
    assert digest(weights, DigestCache(place, later))[1] is False
    monkeypatch.setattr("os.geteuid", lambda: os.getuid() + 1)
    assert f"the directory belongs to uid {os.getuid()}, this process is" in off_reason(
        weights, place
    )


def test_a_symbolic_link_in_the_place_of_the_file_is_not_followed(
    weights: Path, place: Path
) -> None:
    digest(weights, DigestCache(place, later))
    real = (place / "digests").rename(place / "real")
    (place / "digests").symlink_to(real)
    assert "symbolic" in off_reason(weights, place)


def test_a_place_that_cannot_be_written_only_costs_time(weights: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    assert "Not a directory" in off_reason(weights, tmp_path / "file")
    assert "/proc/absent/kvd: " in off_reason(weights, Path("/proc/absent/kvd"))
    assert "HOME" in off_reason(weights, None)


def test_a_read_only_directory_still_serves_what_is_in_it(
    weights: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest(weights, DigestCache(place, later))
    real_open = os.open

    def read_only(path: str, flags: int, *args: int, **kwargs: int) -> int:
        if flags & os.O_CREAT:
            raise PermissionError(13, "Permission denied", path)
        return real_open(path, flags, *args, **kwargs)

    monkeypatch.setattr("kvd_shared.digest_file.os.open", read_only)
    other = weights.with_name("other")
    other.write_bytes(b"abc")
    cache = DigestCache(place, later)
    assert digest(weights, cache)[1] is False
    assert "Permission denied" in off_reason(other, place)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    weights: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest(weights, DigestCache(place, later))
    before = (place / "digests").read_bytes()

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("kvd_shared.digest_file.os.rename", full)
    _append(weights)
    with capture_logs() as logs:
        assert digest(weights, DigestCache(place, later))[1]
    assert "No space left" in logs[0]["why"]
    assert [(f.name, f.read_bytes()) for f in place.iterdir()] == [("digests", before)]


def test_nobody_else_may_read_or_write_the_cache(weights: Path, place: Path) -> None:
    umask = os.umask(0)
    try:
        digest(weights, DigestCache(place, later))
    finally:
        os.umask(umask)
    assert place.stat().st_mode & 0o777 == 0o700
    assert (place / "digests").stat().st_mode & 0o777 == 0o600


def test_the_oldest_entries_go_when_there_are_too_many(
    tmp_path: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digest_file, "MAX_ENTRIES", 3)
    files = [tmp_path / str(number) for number in range(5)]
    for file in files:
        file.write_bytes(file.name.encode())
        digest(file, DigestCache(place, later))
    _touch(files[2])
    digest(files[2], DigestCache(place, later))  # is the youngest now
    digest(files[0], DigestCache(place, later))
    assert len((place / "digests").read_bytes().splitlines()) == 1 + 3
    cache = DigestCache(place, later)
    assert [digest(file, cache)[1] for file in (files[4], files[2], files[0])] == [False] * 3
    assert digest(files[3], cache)[1] and digest(files[1], cache)[1]


def test_a_full_cache_is_within_the_size_that_is_read(tmp_path: Path) -> None:
    most = 2**64 - 1
    entries = {
        (most, number): (digest_file.FileState(most, most - number, most, most, most), bytes(32))
        for number in range(digest_file.MAX_ENTRIES)
    }
    tmp_path.chmod(0o700)
    with digest_file.opened(tmp_path) as fd:
        digest_file.replace(fd, entries)
        assert list(digest_file.load(fd).values()) == list(entries.values())


_WRITER = """\
import hashlib, os, sys, time
from pathlib import Path
from kvd_shared.digest_cache import DigestCache
for name in sys.argv[2:]:
    cache = DigestCache(Path(sys.argv[1]), lambda: time.time_ns() + 3600 * 10**9)
    fd = os.open(name, os.O_RDONLY)
    cache.digest(fd, lambda: hashlib.sha256(Path(name).read_bytes()).digest())
"""


def test_what_another_process_wrote_meanwhile_is_kept(tmp_path: Path, place: Path) -> None:
    caches = [DigestCache(place, later) for _ in range(2)]
    for number, cache in enumerate(caches):
        file = tmp_path / str(number)
        file.write_bytes(b"abc")
        digest(file, cache)
    again = DigestCache(place, later)
    assert [digest(tmp_path / str(number), again)[1] for number in range(2)] == [False, False]


def test_many_writers_at_once_never_leave_half_a_file(tmp_path: Path, place: Path) -> None:
    """Each writes 20 entries, while this process reads; then all that is there is right."""
    files = [tmp_path / f"file-{number}" for number in range(80)]
    for file in files:
        file.write_bytes(file.name.encode())
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", _WRITER, str(place), *map(str, files[i::4])],
            stdout=subprocess.PIPE,
        )
        for i in range(4)
    ]
    with capture_logs() as logs:
        while any(writer.poll() is None for writer in writers):
            DigestCache(place, later)
        cache = DigestCache(place, later)
    said = [writer.communicate()[0] for writer in writers]
    assert [writer.returncode for writer in writers] == [0] * 4
    assert logs == [] and said == [b""] * 4  # never damaged, never off
    assert all(is_right(file, cache) for file in files)
    assert cache.num_hits >= 1  # the last line that was written was not lost
    again = DigestCache(place, later)
    assert all(is_right(file, again) for file in files) and again.num_hits == len(files)
    assert [path.name for path in place.iterdir()] == ["digests"]


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({"HOME": "/home/u"}, "/home/u/.cache/kvd"),
        ({"HOME": "/home/u", "XDG_CACHE_HOME": "/c"}, "/c/kvd"),
        ({"HOME": "/home/u", "XDG_CACHE_HOME": "relative"}, "/home/u/.cache/kvd"),
        ({"XDG_CACHE_HOME": "/c", "CACHE_DIRECTORY": "/var/cache/kvd"}, "/var/cache/kvd"),
        ({"CACHE_DIRECTORY": "/var/cache/kvd:/var/cache/more"}, "/var/cache/kvd"),
        ({"CACHE_DIRECTORY": "", "XDG_CACHE_HOME": "", "HOME": ""}, None),
        ({}, None),
    ],
)
def test_where_the_cache_is(env: dict[str, str], expected: str | None) -> None:
    assert default_cache_dir(env) == (Path(expected) if expected else None)
