"""What is compiled must be made of the sources that are there."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvd_shared import compiled
from kvd_shared.compiled import COMPILED, INTERPRETED, MODULES, RECORD, StaleModules, digests


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Folders with the packages' sources, compiled."""
    monkeypatch.setattr(compiled, "folder_of", lambda package: tmp_path / package)
    for package, names in MODULES.items():
        for name in names:
            source = tmp_path / package / f"{name}.py"
            source.parent.mkdir(parents=True, exist_ok=True)
            source.write_text(f"# {name}")
            source.with_suffix(".cpython-311-x86_64-linux-gnu.so").touch()
        (tmp_path / package / RECORD).write_text(json.dumps(digests(package)))
    compiled.state.cache_clear()
    yield tmp_path
    compiled.state.cache_clear()


def remove(package: Path) -> None:
    for path in [*package.rglob("*.so"), package / RECORD]:
        path.unlink()


def test_modules_of_these_sources_are_compiled(packages: Path) -> None:
    assert compiled.state() == COMPILED


def test_sources_alone_are_interpreted(packages: Path) -> None:
    for package in MODULES:
        remove(packages / package)
    assert compiled.state() == INTERPRETED


def test_a_changed_source_is_refused(packages: Path) -> None:
    (packages / "kvd" / "node.py").write_text("# another")
    with pytest.raises(StaleModules, match=r"1 differ: node.*make core"):
        compiled.state()


def test_modules_of_unknown_sources_are_refused(packages: Path) -> None:
    (packages / "kvd_shared" / RECORD).unlink()
    with pytest.raises(StaleModules, match="calls, rpc, wire"):
        compiled.state()


def test_a_missing_module_is_refused(packages: Path) -> None:
    next((packages / "kvd").glob("node.*.so")).unlink()
    with pytest.raises(StaleModules):
        compiled.state()


def test_a_part_is_refused(packages: Path) -> None:
    remove(packages / "kvd")
    with pytest.raises(StaleModules, match="only a part"):
        compiled.state()


def test_every_named_module_is_there() -> None:
    for package in MODULES:
        assert len(digests(package)) == len(MODULES[package])
