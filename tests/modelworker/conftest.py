"""One thread: the tensors are tiny, and threads that wait for each other take most of the time."""

import pytest
import torch

from modelworker.tokenizer import Tokenizer
from tests.modelworker import toy_tokenizers

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_folder(toy_tokenizers.folder(tmp_path_factory.mktemp("toy")))
