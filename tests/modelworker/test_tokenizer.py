"""What is read from a model folder, and the prompts that come of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvd_shared.errors import BadRequest
from kvd_shared.model_folder import BadModelFolder
from modelworker.tokenizer import Tokenizer
from tests.modelworker.toy_tokenizers import TEMPLATE, byte_level, chatty, folder

HELLO = [{"role": "user", "content": "the cat"}]


def test_text_comes_back_and_the_opening_token_comes_from_the_post_processor() -> None:
    tokenizer = Tokenizer(byte_level())
    bare = tokenizer.encode("the 你 😀", add_special_tokens=False)
    assert tokenizer.encode("the 你 😀") == [0, *bare]
    assert tokenizer.decode([0, *bare, 1]) == "the 你 😀"
    assert max(bare) < tokenizer.vocab_size == 320


def test_truncation_and_padding_of_the_training_are_not_a_prompts() -> None:
    backend = byte_level()
    backend.enable_truncation(4)
    backend.enable_padding(length=20)
    assert len(Tokenizer(backend).encode("the cat sat on the mat")) == 8
    assert len(Tokenizer(backend).encode("a")) == 2


def test_special_tokens_and_ids_past_the_vocabulary_have_no_text() -> None:
    tokenizer = Tokenizer(byte_level())
    assert [tokenizer.has_text(i) for i in (0, 1, 2, 319, 320)] == [False, False, True, True, False]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, set()),
        ({"config": {"eos_token_id": 5}}, {5}),
        ({"config": {"eos_token_id": 5}, "generation_config": {"eos_token_id": [6, 7]}}, {6, 7}),
        ({"config": {"eos_token_id": 5}, "generation_config": {"top_k": 1}}, {5}),
        ({"config": {"eos_token_id": 5}, "tokenizer_config": {"eos_token": "</s>"}}, {5, 1}),
        ({"tokenizer_config": {"eos_token": {"content": "</s>", "lstrip": False}}}, {1}),
        ({"tokenizer_config": {"eos_token": "not in the vocabulary"}}, set()),
    ],
)
def test_where_eos_comes_from(tmp_path: Path, files: dict[str, object], expected: set[int]) -> None:
    assert Tokenizer.from_folder(folder(tmp_path, **files)).eos_ids == expected


def test_a_chat_prompt_has_its_special_tokens_once(tmp_path: Path) -> None:
    tokenizer = chatty(tmp_path)
    ids = tokenizer.encode_chat(HELLO)
    assert ids == tokenizer.encode("[user] the cat\n[assistant] ")
    assert ids.count(0) == 1


@pytest.mark.parametrize(
    ("key", "file", "text"),
    [
        (TEMPLATE, None, "[user] the cat\n[assistant] "),
        (TEMPLATE, "{{ messages[0].content }}!", "the cat!"),
        ([{"name": "tool_use", "template": "x"}, {"name": "default", "template": "y"}], None, "y"),
        ("{% if tools is not none %}tools{% endif %}{{ '<&>' | tojson }}", None, '"<&>"'),
        ("{% generation %}a{% endgeneration %}{% for m in 'ab' %}{% break %}{% endfor %}", "", ""),
        (
            "{% generation %}a{% endgeneration %}{% for m in 'ab' %}{% break %}{% endfor %}",
            None,
            "a",
        ),
        ("{{ strftime_now('%%') }}\n  {% if true %}\n  b{% endif %}", None, "%\n  b"),
    ],
)
def test_chat_templates(tmp_path: Path, key: object, file: str | None, text: str) -> None:
    folder(tmp_path, tokenizer_config={"bos_token": "<s>", "chat_template": key})
    if file is not None:
        (tmp_path / "chat_template.jinja").write_text(file)
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.decode(tokenizer.encode_chat(HELLO)) == text


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "no chat template"),
        (
            {"chat_template": "{{ raise_exception('roles must alternate') }}"},
            "roles must alternate",
        ),
        ({"chat_template": "{{ messages.append(1) }}"}, "refuses"),  # the sandbox
        ({"chat_template": "{{ messages[0].content.x.y }}"}, "refuses"),
    ],
)
def test_a_chat_that_has_no_prompt_is_the_requests_fault(
    tmp_path: Path, config: dict[str, object], message: str
) -> None:
    tokenizer = Tokenizer.from_folder(folder(tmp_path, tokenizer_config=config))
    with pytest.raises(BadRequest, match=message):
        tokenizer.encode_chat(HELLO)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", "{}", "not a tokenizer"),
        ("config.json", "{", "not JSON"),
        ("config.json", "[]", "no JSON object"),
        ("config.json", json.dumps({"eos_token_id": "</s>"}), "eos_token_id"),
        ("tokenizer_config.json", json.dumps({"chat_template": "{% if %}"}), "compile"),
        ("tokenizer_config.json", json.dumps({"chat_template": 3}), "chat_template"),
    ],
)
def test_a_bad_folder_is_named(tmp_path: Path, name: str, content: str, message: str) -> None:
    (folder(tmp_path) / name).write_text(content)
    with pytest.raises(BadModelFolder, match=message):
        Tokenizer.from_folder(tmp_path)


def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadModelFolder, match=r"no tokenizer\.json"):
        Tokenizer.from_folder(tmp_path)
