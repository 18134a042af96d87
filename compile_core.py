"""Compile the cache core, and what a request passes through, ahead of time with mypyc.

    python compile_core.py             in place, if a source has changed since
    python compile_core.py --remove    take the compiled modules away: the sources run as they are

It is the same typed Python either way; interpreted it takes about twice as long. `kvdctl status`
and the daemon's log say which it is.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parent
FOLDERS = {"kvd": "kvd", "kvd_shared": "shared/kvd_shared"}
sys.path[:0] = [os.fspath(ROOT), os.fspath(ROOT / "shared")]  # the sources beside this file

from kvd_shared.compiled import (  # noqa: E402  (found by the line above)
    COMPILED,
    MODULES,
    RECORD,
    StaleModules,
    digests,
    state,
)


def is_up_to_date() -> bool:
    try:
        return state() == COMPILED
    except StaleModules:
        return False


def compile_core() -> None:
    """Put extension modules, and what they were made of, beside the sources."""
    from mypyc.build import mypycify  # here: --remove needs neither
    from setuptools import setup

    remove()
    made_of = {package: digests(package) for package in MODULES}
    groups = [
        ([f"{FOLDERS[package]}/{name}.py" for name in names], f"{package}.compiled")
        for package, names in MODULES.items()
    ]
    before = os.getcwd()
    os.chdir(ROOT)  # mypy reads its settings there
    try:
        with TemporaryDirectory() as folder:
            setup(
                name="kvd-core",
                packages=["kvd", "kvd.policies", "kvd_shared"],
                package_dir=FOLDERS,
                ext_modules=mypycify(
                    ["--cache-dir", f"{folder}/mypy", *(path for g in groups for path in g[0])],
                    opt_level="2",
                    separate=groups,
                    target_dir=folder,
                ),
                script_args=["-q", "build_ext", "--inplace", "--build-temp", folder],
            )
    finally:
        os.chdir(before)
    for package, sources in made_of.items():
        record = ROOT / FOLDERS[package] / RECORD
        record.write_text(json.dumps(sources, indent=1) + "\n")


def remove() -> None:
    for folder in FOLDERS.values():
        for path in [*(ROOT / folder).rglob("*.so"), ROOT / folder / RECORD]:
            path.unlink(missing_ok=True)


def main(arguments: list[str]) -> int:
    if arguments == ["--remove"]:
        remove()
    elif arguments:
        print(__doc__, file=sys.stderr)
        return 2
    elif is_up_to_date():
        pass
    elif shutil.which(os.environ.get("CC", "cc")) is None:
        remove()
        print("no C compiler (cc) here: kvd's core runs interpreted, at about half the speed")
    else:
        print(f"compiling {sum(map(len, MODULES.values()))} modules (half a minute)", flush=True)
        compile_core()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
