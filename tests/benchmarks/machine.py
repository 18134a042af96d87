"""What a benchmark ran on: the machine and the versions that its figures belong to."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from kvd_shared import compiled

ROOT = Path(__file__).resolve().parents[2]


def machine() -> dict[str, Any]:
    """Processor, cores that this process may use, memory, kernel, and how busy it was."""
    return {
        "cpu": _field(Path("/proc/cpuinfo"), "model name") or platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "load_average": os.getloadavg(),
    }


def versions(*packages: str) -> dict[str, str | None]:
    """Of Python, kvd, its commit, whether its core is compiled, and `packages`; None where one is
    not there."""
    found: dict[str, str | None] = {
        "python": platform.python_version(),
        "commit": _commit(),
        "core": compiled.state(),
    }
    for name in ("kvd", *packages):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def _field(path: Path, name: str) -> str | None:
    """The first `name : value` of a file of /proc."""
    if not path.exists():
        return None
    for line in path.read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return None


def _commit() -> str | None:
    """The checkout's commit, with a + where the tree has changed since; None outside one."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--exclude=*"],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
    except OSError:
        return None
    return done.stdout.strip() or None
