"""The tiny model of all tests here, made once. Tests of the daemon alone do not wait for torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.worker import WorkerNursery, worker_nursery

if TYPE_CHECKING:
    from tests.integration.tiny_world import Oracle


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.integration.tiny_world import make_folder

    return make_folder(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def oracle(folder: Path) -> Oracle:
    import torch

    from tests.integration.tiny_world import Oracle

    torch.set_num_threads(1)  # the tensors are tiny
    return Oracle(folder)


@pytest.fixture(scope="session")
def nursery(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerNursery]:
    with worker_nursery(folder, tmp_path_factory.mktemp("workers")) as nursery:
        yield nursery
