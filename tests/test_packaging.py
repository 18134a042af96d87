"""What the layout of the repository promises, and the files that a reader copies from."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from kvd.config import load_config

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("folder", ["kernels", "shared"])
def test_the_outer_folders_are_no_packages(folder: str) -> None:
    """`kernels` is the import name of another package, which ours must never shadow."""
    assert (ROOT / folder).is_dir()
    assert not (ROOT / folder / "__init__.py").exists()


@pytest.mark.parametrize("module", ["kvd.server", "kvd.admin", "kvd_shared.async_client"])
def test_the_daemon_and_the_clients_never_load_the_model_stack(module: str) -> None:
    script = (
        f"import sys, {module}; print({{'torch', 'triton', 'transformers'}} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "set()"), done.stderr


def test_the_example_configuration_is_valid_and_complete(tmp_path: Path) -> None:
    path = ROOT / "systemd" / "kvd.toml.example"
    config = load_config(path, {}, {})
    assert [pool.name for pool in config.pools] == ["llama"]
    commented = path.read_text().partition("# [[pool]]")[2]
    second = "[[pool]]" + commented.replace("\n# ", "\n")
    assert "num_kv_heads = 8" in second
    both = path.read_text().partition("# A pool for")[0] + second
    example = tmp_path / "both.toml"
    example.write_text(both)
    assert [pool.name for pool in load_config(example, {}, {}).pools] == ["llama", "any"]
