"""Which modules are compiled ahead of time, and whether they are, of the sources as they stand.

mypyc makes an extension module of each; Python prefers those to the sources beside them. `make
core` compiles in place, building a wheel compiles into the wheel. The sources are plain typed
Python and run as they are, too.
"""

from __future__ import annotations

import hashlib
import json
from functools import cache
from importlib.util import find_spec
from pathlib import Path

RECORD = "compiled.json"  # in each package: digests of what its extension modules were made of
COMPILED, INTERPRETED = "compiled", "interpreted"

# By package: the cache core and what a request passes through. None reads a file or a clock, and
# nothing in them is replaced from outside; classes that look at foreign values (retention) are not
# here, since compiled code refuses what has another type with a TypeError of its own.
MODULES: dict[str, tuple[str, ...]] = {
    "kvd": (
        "age_queue",
        "announcements",
        "arguments",
        "cache",
        "children",
        "departures",
        "dispatch",
        "eviction",
        "free_list",
        "handover",
        "holdings",
        "matching",
        "node",
        "operations",
        "operator_retains",
        "policies/age_bands",
        "policies/ghosts",
        "policies/hit_density",
        "policies/hit_history",
        "policies/lru",
        "policies/policy",
        "policies/recompute_cost",
        "prefix",
        "publishing",
        "radix_tree",
        "results",
        "sequences",
        "session",
        "timers",
        "tree_leaving",
        "tree_reading",
        "tree_shape",
        "versions",
    ),
    "kvd_shared": ("calls", "rpc", "wire"),
}


class StaleModules(Exception):
    """What is compiled was made of other sources: what runs is not what they say."""


@cache
def state() -> str:
    """COMPILED or INTERPRETED, as looked at once: a process goes on with what it has loaded. Raises
    StaleModules."""
    states = {_state_of(package, names) for package, names in MODULES.items()}
    if len(states) > 1:
        raise StaleModules(f"of {', '.join(MODULES)} only a part is compiled{_REMEDY}")
    return states.pop()


_REMEDY = ": run `make core` to compile, or `make core-remove` to run the sources as they are"


def _state_of(package: str, names: tuple[str, ...]) -> str:
    folder = folder_of(package)
    modules = [path for name in names for path in folder.glob(f"{name}.*.so")]
    record = folder / RECORD
    if not modules and not record.exists():
        return INTERPRETED
    made_of = json.loads(record.read_text()) if record.exists() else {}
    now = digests(package)
    changed = sorted(name for name in now if made_of.get(name) != now[name])
    if changed or len(made_of) != len(now) or len(modules) < len(names):
        raise StaleModules(
            f"{folder} has compiled modules of other sources "
            f"({len(changed)} differ: {', '.join(changed[:5])}){_REMEDY}"
        )
    return COMPILED


def folder_of(package: str) -> Path:
    found = find_spec(package)
    assert found is not None and found.origin is not None
    return Path(found.origin).parent


def digests(package: str) -> dict[str, str]:
    """Of each module's source."""
    folder = folder_of(package)
    return {
        name: hashlib.sha256((folder / f"{name}.py").read_bytes()).hexdigest()
        for name in MODULES[package]
    }
