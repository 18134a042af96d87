"""How much memory this process can still take."""

from __future__ import annotations

from pathlib import Path

_UNLIMITED = 1 << 62


def available_bytes() -> int:
    """Memory that can be taken without swapping or hitting the limit of a cgroup above us.

    Asked for beforehand, since going over a cgroup's limit is answered by the OOM killer, not by
    ENOMEM. What cannot be read does not limit.
    """
    limits = [_mem_available()]
    try:
        path = Path("/proc/self/cgroup").read_text().split("0::/", 1)[1].split("\n", 1)[0]
        own = Path("/sys/fs/cgroup") / path
        for group in (own, *own.parents[: len(Path(path).parts)]):
            limits.append(_cgroup_room(group))
    except (OSError, IndexError):
        pass  # no cgroup v2
    return min(limits)


def _mem_available() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return _UNLIMITED


def _cgroup_room(group: Path) -> int:
    try:
        limit = (group / "memory.max").read_text().strip()
        used = int((group / "memory.current").read_text())
        stat = (group / "memory.stat").read_text().split()
    except OSError:
        return _UNLIMITED
    if limit == "max":
        return _UNLIMITED
    # the page cache of files counts as used, but makes room
    reclaimable = int(stat[stat.index("inactive_file") + 1])
    return max(0, int(limit) - used + reclaimable)
