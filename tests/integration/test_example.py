"""The example for authors of other engines, as its users run it."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kvd_shared import verbs
from kvd_shared.namespace import Namespace
from tests.daemon import RunningDaemon, child_environment, running_daemon

EXAMPLE = Path(__file__).parents[2] / "examples" / "transformers_prefix_cache.py"
PROMPT = " ".join(f"w{i * i % 90}" for i in range(40))
NUM_NEW = 12
PAGE = 8  # tokens


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama whose words are w0 to w99."""
    folder = tmp_path_factory.mktemp("model")
    vocab = {f"w{i}": i for i in range(100)}
    words = Tokenizer(models.WordLevel(vocab, unk_token="w99"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w99").save_pretrained(folder)
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def daemon(tmp_path: Path, folder: Path) -> Iterator[RunningDaemon]:
    with running_daemon(tmp_path, model=folder, page_size=PAGE, num_pages=16) as daemon:
        yield daemon


def token_ids(words: str) -> list[int]:
    return [int(word[1:]) for word in words.split()]


def plain_tokens(folder: Path, prompt: list[int]) -> list[int]:
    """What transformers answers without a cache of ours."""
    model = LlamaForCausalLM.from_pretrained(folder)
    output = model.generate(torch.tensor([prompt]), max_new_tokens=NUM_NEW, do_sample=False)
    tokens: list[int] = output[0, len(prompt) :].tolist()
    return tokens


def run(daemon: RunningDaemon, folder: Path) -> tuple[int, int, list[int]]:
    """A process of its own: cached prompt tokens, pages added, tokens generated."""
    where = ["--model", str(folder), "--socket-dir", str(daemon.socket_dir)]
    offline = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), *where, "--max-new-tokens", str(NUM_NEW), PROMPT],
        capture_output=True, text=True, check=False, timeout=120, env=child_environment() | offline,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = re.search(r"cached: (\d+) of 40 prompt tokens; (\d+) pages added", done.stdout)
    tokens = re.search(r"tokens: \[(.*)\]", done.stdout)
    assert found is not None
    assert tokens is not None
    return int(found[1]), int(found[2]), [int(t) for t in tokens[1].split(",")]


def test_the_second_process_finds_what_the_first_has_computed(
    daemon: RunningDaemon, folder: Path
) -> None:
    plain = plain_tokens(folder, token_ids(PROMPT))
    computed = (40 + NUM_NEW - 1) // PAGE  # all but the last token, which was never read back
    assert run(daemon, folder) == (0, computed, plain)
    assert daemon.counts()["cached"] == computed
    assert run(daemon, folder) == (32, 0, plain)  # the last prompt token has to be computed
    assert daemon.counts()["cached"] == computed
    daemon.check()


def test_a_conversation_goes_on_behind_its_answer(
    daemon: RunningDaemon, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And prompts of all lengths are answered as without a cache, wherever a page ends."""
    example = runpy.run_path(str(EXAMPLE))
    model = LlamaForCausalLM.from_pretrained(folder)
    with daemon.attach() as worker:
        prefixes = example["PrefixCache"](worker, Namespace(model="m"))
        prompt = token_ids(PROMPT)
        for length in (1, 7, 8, 9, 15, 16, 17, 40):
            answer = example["generate"](model, prefixes, prompt[:length], NUM_NEW)
            assert answer == plain_tokens(folder, prompt[:length])
        capsys.readouterr()
        longer = [*prompt, *answer, 5]
        answer = example["generate"](model, prefixes, longer, NUM_NEW)
        assert answer == plain_tokens(folder, longer)
        assert capsys.readouterr().out == "cached: 48 of 53 prompt tokens; 2 pages added\n"
    counts = daemon.counts()
    assert counts["free"] + counts["cached"] == 16
    daemon.check()


def test_a_full_pool_is_no_failure(
    daemon: RunningDaemon, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    example = runpy.run_path(str(EXAMPLE))
    model = LlamaForCausalLM.from_pretrained(folder)
    with daemon.attach("hoards") as hoarder, daemon.attach() as worker:
        hoarder.call(verbs.allocate(14))
        prefixes = example["PrefixCache"](worker, Namespace(model="m"))
        answer = example["generate"](model, prefixes, token_ids(PROMPT), NUM_NEW)
        assert answer == plain_tokens(folder, token_ids(PROMPT))
        assert "not cached: 6 pages wanted, 2 of the pool's 16" in capsys.readouterr().out
        assert daemon.counts()["writing"] == 14
    daemon.check()
