"""Puts each fault of the *.toml beside it into a copy of the sources and sees a test fail.

    python -m tests.mutants.run          all of them
    python -m tests.mutants.run WORD     those with WORD in the name of a file or in what it breaks

The work tree is never changed. Exit status 1: a fault survived its tests, the tests fail without
a fault, or an `old` text does not stand exactly once in its file.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
SOURCES = ("kvd", "modelworker", "kernels", "shared", "tests", "pyproject.toml")
LEFT_OUT = ("__pycache__", "*.so", "compiled.json")  # a fault is in the source, which is to run
LIMIT_S = 100.0  # a fault can make a test run for ever; that is seen too


@dataclass(frozen=True, slots=True)
class Mutant:
    listed_in: str
    file: str
    tests: tuple[str, ...]
    breaks: str
    old: str
    new: str

    @property
    def text(self) -> str:
        return f"{self.listed_in} {self.file} {self.breaks}"


def main(words: list[str]) -> int:
    mutants = [m for m in load() if all(word in m.text for word in words)]
    wrong = [m for m in mutants if (REPOSITORY / m.file).read_text().count(m.old) != 1]
    for mutant in wrong:
        print(f"{mutant.file}: {mutant.breaks}: `old` must stand exactly once\n{mutant.old}")
    if wrong or not mutants:
        print(f"{len(wrong)} of {len(mutants)} faults do not fit the sources")
        return 1
    with tempfile.TemporaryDirectory(prefix="kvd-mutants-") as folder:
        tree = copy_sources(Path(folder))
        for tests in sorted({m.tests for m in mutants}):
            if run_tests(tree, tests):
                print(f"{' '.join(tests)} fail without any fault")
                return 1
        survived = sum(not is_killed(tree, mutant) for mutant in mutants)
    print(f"\n{len(mutants)} faults, {len(mutants) - survived} killed, {survived} survived")
    return 1 if survived else 0


def load() -> list[Mutant]:
    return [
        Mutant(path.name, group["file"], tuple(group["tests"]), **fault)
        for path in sorted(Path(__file__).parent.glob("*.toml"))
        for group in tomllib.loads(path.read_text())["group"]
        for fault in group["fault"]
    ]


def copy_sources(folder: Path) -> Path:
    for name in SOURCES:
        source = REPOSITORY / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns(*LEFT_OUT))
        else:
            shutil.copy(source, folder)
    return folder


def is_killed(tree: Path, mutant: Mutant) -> bool:
    """Apply the fault, run the tests, take it back; prints one line of the table."""
    path = tree / mutant.file
    good, started = path.read_text(), time.monotonic()
    path.write_text(good.replace(mutant.old, mutant.new))
    try:
        killed = run_tests(tree, mutant.tests)
    finally:
        path.write_text(good)
    result, seconds = "killed" if killed else "SURVIVED", time.monotonic() - started
    print(f"{result:9}{seconds:6.1f} s  {mutant.file:20} {mutant.breaks}", flush=True)
    return killed


def run_tests(tree: Path, tests: tuple[str, ...]) -> bool:
    """Whether one of them fails."""
    paths = [str(tree / name) for name in (".", "kernels", "shared")]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONDONTWRITEBYTECODE": "1",  # a stale one would hide the next fault
    }
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    try:
        done = subprocess.run(
            command, cwd=tree, env=environment, capture_output=True, timeout=LIMIT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return True
    if done.returncode not in (0, 1):  # pytest: 0 all passed, 1 some failed; the rest is our fault
        raise RuntimeError(done.stdout.decode() + done.stderr.decode())
    return done.returncode == 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
