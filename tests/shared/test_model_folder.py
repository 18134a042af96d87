from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kvd_shared.model_folder import (
    BadModelFolder,
    model_fingerprint,
    read_model_folder,
    weight_files,
)

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "hidden_size": 96,
    "max_position_embeddings": 512,
    "dtype": "bfloat16",
}


def folder(path: Path, weights: dict[str, bytes] | None = None, **changes: Any) -> Path:
    path.mkdir(exist_ok=True)
    config = {key: value for key, value in {**CONFIG, **changes}.items() if value is not ...}
    (path / "config.json").write_text(json.dumps(config))
    for name, content in (weights or {}).items():
        (path / name).write_bytes(content)
    return path


def sharded(path: Path, *contents: bytes, **changes: Any) -> Path:
    files = {f"model-{i}.safetensors": content for i, content in enumerate(contents)}
    folder(path, files, **changes)
    index = {"weight_map": {f"tensor {name}": name for name in files}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


def test_geometry_context_dtype_and_architecture(tmp_path: Path) -> None:
    model = read_model_folder(folder(tmp_path))
    assert (model.num_layers, model.num_kv_heads, model.head_dim) == (2, 3, 16)
    assert (model.context_length, model.dtype) == (512, "bfloat16")
    assert model.architecture == "LlamaForCausalLM"
    layout = model.layout(page_size=32)
    assert layout.describe() == "2 layers x 3 kv heads x 16, bfloat16, page 32 tokens"
    assert model.layout(page_size=16, dtype="float32").dtype == "float32"


@pytest.mark.parametrize(
    ("changes", "attribute", "expected"),
    [
        ({"head_dim": 24}, "head_dim", 24),
        ({"head_dim": None}, "head_dim", 16),
        ({"num_key_value_heads": ...}, "num_kv_heads", 6),
        ({"dtype": ..., "torch_dtype": "float16"}, "dtype", "float16"),
        ({"dtype": ...}, "dtype", "float32"),
    ],
)
def test_keys_that_may_be_absent_or_named_otherwise(
    tmp_path: Path, changes: dict[str, Any], attribute: str, expected: object
) -> None:
    assert getattr(read_model_folder(folder(tmp_path, **changes)), attribute) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": ...}, "num_hidden_layers is missing: must be a whole number"),
        ({"num_hidden_layers": 2.5}, "num_hidden_layers = 2.5: must be a whole number"),
        ({"num_hidden_layers": True}, "num_hidden_layers = True: must be a whole number"),
        ({"num_attention_heads": 0}, "num_attention_heads = 0: must be at least 1"),
        ({"num_attention_heads": 97}, "head_dim = 0: must be at least 1"),
        ({"architectures": ...}, r"architectures = None: must name one, as in \[\"Llama"),
        ({"architectures": ["A", "B"]}, r"architectures = \['A', 'B'\]: must name one"),
        ({"dtype": "int8"}, "dtype = 'int8': supported are float32, bfloat16, float16"),
        ({"dtype": ["int8"]}, r"dtype = \['int8'\]: supported are float32"),
        ({"kv_lora_rank": 512}, "kv_lora_rank is set: latent attention keeps no K and V heads"),
    ],
)
def test_a_config_that_will_not_do_is_refused_by_file_and_key(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(BadModelFolder, match=f"config.json: {message}"):
        read_model_folder(folder(tmp_path, **changes))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "config.json: no such file: is this a model folder?"),
        (b"{", "config.json: cannot be read as JSON: Expecting property name"),
        (b"\xff\xfe\xfd", "config.json: cannot be read as JSON: "),
        (b"[1]", "config.json: holds list, must hold a JSON map"),
    ],
)
def test_a_file_that_is_no_config(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(BadModelFolder) as refused:
        read_model_folder(tmp_path)
    assert message in refused.value.message


def test_weight_files_in_the_order_of_their_names(tmp_path: Path) -> None:
    files = weight_files(sharded(tmp_path, b"a", b"b"))
    assert [file.name for file in files] == ["model-0.safetensors", "model-1.safetensors"]
    (tmp_path / "model.safetensors").write_bytes(b"c")
    assert [file.name for file in weight_files(tmp_path)] == ["model.safetensors"]


def test_weight_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(BadModelFolder, match=r"has neither model\.safetensors nor model"):
        weight_files(folder(tmp_path))
    sharded(tmp_path, b"a", b"b")
    (tmp_path / "model-1.safetensors").unlink()
    with pytest.raises(BadModelFolder, match=r"model-1.safetensors: no such file, but .* names it"):
        weight_files(tmp_path)


@pytest.mark.parametrize("weight_map", [{}, {"t": 3}, {"t": "../other/model.safetensors"}])
def test_an_index_may_only_name_files_of_the_folder(
    tmp_path: Path, weight_map: dict[str, object]
) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(BadModelFolder, match="weight_map must map tensors to files of the folder"):
        weight_files(tmp_path)


def test_the_fingerprint_is_the_content(tmp_path: Path) -> None:
    one = model_fingerprint(sharded(tmp_path / "a", b"abc", b"def"))
    assert len(one) == 32
    assert int(one, 16)
    assert one == model_fingerprint(sharded(tmp_path / "b", b"abc", b"def"))
    elsewhere = {"_name_or_path": "there", "transformers_version": "4.0"}
    assert one == model_fingerprint(sharded(tmp_path / "c", b"abc", b"def", **elsewhere))
    (tmp_path / "c" / "tokenizer.json").write_text("{}")
    assert one == model_fingerprint(tmp_path / "c")
    others = [
        model_fingerprint(sharded(tmp_path / "d", b"abc", b"deg")),
        model_fingerprint(sharded(tmp_path / "e", b"abcd", b"ef")),
        model_fingerprint(sharded(tmp_path / "f", b"abc", b"def", rms_norm_eps=1e-5)),
    ]
    assert len({one, *others}) == 4


def test_the_order_of_keys_in_the_config_does_not_count(tmp_path: Path) -> None:
    one = model_fingerprint(sharded(tmp_path, b"abc"))
    backwards = dict(reversed(CONFIG.items()))
    (tmp_path / "config.json").write_text(json.dumps(backwards, indent=4))
    assert model_fingerprint(tmp_path) == one


def test_fingerprint_progress_ends_at_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvd_shared.model_folder.READ_BYTES", 4)
    seen: list[tuple[int, int]] = []
    model_fingerprint(
        sharded(tmp_path, b"abcdef", b"gh"), lambda done, total: seen.append((done, total))
    )
    assert seen == [(4, 8), (6, 8), (8, 8)]
