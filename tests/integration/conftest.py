"""The tiny model of all tests here, made once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.integration.tiny_world import Oracle, make_folder
from tests.worker import WorkerNursery, worker_nursery

torch.set_num_threads(1)  # the tensors are tiny


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def oracle(folder: Path) -> Oracle:
    return Oracle(folder)


@pytest.fixture(scope="session")
def nursery(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerNursery]:
    with worker_nursery(folder, tmp_path_factory.mktemp("workers")) as nursery:
        yield nursery
