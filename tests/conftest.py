"""What no test may touch: the user's own cache. And what none may run on: other sources' code."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kvd_shared import compiled


def pytest_report_header() -> str:
    """Raises StaleModules: no test says anything of sources that do not run."""
    return f"kvd's core: {compiled.state()}"


@pytest.fixture(scope="session", autouse=True)
def _own_cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Also of the daemons and workers that tests start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("xdg-cache")))
        patch.delenv("CACHE_DIRECTORY", raising=False)
        yield
