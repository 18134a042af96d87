"""kvd's short list of what modelworker refuses, held against modelworker's own reading."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from kvd.config import load_config, resolve_pool
from kvd.config_model import SERVED, unserved
from kvd_shared.model_folder import BadModelFolder, read_model_folder

CONFIG: dict[str, Any] = {
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "hidden_size": 64,
    "intermediate_size": 128,
    "vocab_size": 100,
    "max_position_embeddings": 512,
    "sliding_window": None,
}


def folder(path: Path, architecture: str, **changes: Any) -> Path:
    config = {key: value for key, value in {**CONFIG, **changes}.items() if value is not ...}
    (path / "config.json").write_text(json.dumps({"architectures": [architecture]} | config))
    return path


def is_refused_by_modelworker(path: Path) -> bool:
    from modelworker.model import read_config

    try:
        read_config(read_model_folder(path))
    except BadModelFolder:
        return True
    return False


def test_the_families_are_those_of_modelworker() -> None:
    from modelworker.model import FAMILIES

    assert SERVED.keys() == FAMILIES.keys()


@pytest.mark.parametrize("architecture", SERVED)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"hidden_act": "silu", "layer_types": ["full_attention"] * 2, "quantization_config": None},
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
        {"partial_rotary_factor": 1.0, "use_sliding_window": False},
    ],
)
def test_what_modelworker_serves_is_not_warned_of(
    tmp_path: Path, architecture: str, changes: dict[str, Any]
) -> None:
    path = folder(tmp_path, architecture, **changes)
    assert not is_refused_by_modelworker(path)
    assert unserved(read_model_folder(path)) == []


@pytest.mark.parametrize(
    ("architecture", "changes", "field"),
    [
        ("GPT2LMHeadModel", {}, "architectures = ['GPT2LMHeadModel']: served are Llama"),
        ("MistralForCausalLM", {"sliding_window": 4096}, "sliding_window = 4096"),
        ("MistralForCausalLM", {"sliding_window": ...}, "sliding_window = absent"),
        ("MistralForCausalLM", {"num_key_value_heads": ...}, "num_key_value_heads is missing"),
        ("Qwen2ForCausalLM", {"use_sliding_window": True}, "use_sliding_window = true"),
        ("Qwen2ForCausalLM", {"num_key_value_heads": ...}, "num_key_value_heads is missing"),
        ("Qwen3ForCausalLM", {"use_sliding_window": True}, "use_sliding_window = true"),
        ("Qwen3ForCausalLM", {"head_dim": ...}, "head_dim is missing"),
        ("LlamaForCausalLM", {"intermediate_size": ...}, "intermediate_size is missing"),
        ("LlamaForCausalLM", {"vocab_size": None}, "vocab_size is missing"),
        ("LlamaForCausalLM", {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ("LlamaForCausalLM", {"quantization_config": {"bits": 4}}, "quantization_config is set"),
        (
            "LlamaForCausalLM",
            {"layer_types": ["full_attention", "sliding_attention"]},
            "layer_types has 'sliding_attention'",
        ),
        ("LlamaForCausalLM", {"num_key_value_heads": 3}, "no multiple of num_key_value_heads"),
        ("LlamaForCausalLM", {"head_dim": 15}, "head_dim = 15"),
        ("LlamaForCausalLM", {"rope_scaling": {"type": "yarn", "factor": 2}}, "rope_scaling = {"),
        ("LlamaForCausalLM", {"rope_scaling": [1]}, "rope_scaling = [1]"),
        ("LlamaForCausalLM", {"rope_parameters": {"a": {}}}, "rope_parameters = {"),
        ("LlamaForCausalLM", {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        (
            "LlamaForCausalLM",
            {"rope_parameters": {"partial_rotary_factor": 0.25}},
            "partial_rotary_factor = 0.25",
        ),
    ],
)
def test_what_modelworker_refuses_is_warned_of_by_its_field(
    tmp_path: Path, architecture: str, changes: dict[str, Any], field: str
) -> None:
    path = folder(tmp_path, architecture, **changes)
    assert is_refused_by_modelworker(path)
    (why,) = unserved(read_model_folder(path))
    assert why.startswith(f"{path}/config.json: ") and field in why


@pytest.mark.parametrize("layer_types", [5, "full", [None], [["a"]], {"a": 1}])
def test_a_field_of_a_wrong_type_is_no_reason_to_fail(tmp_path: Path, layer_types: Any) -> None:
    """The warning is for the operator; whether the pool can be made is not its question."""
    path = folder(tmp_path, "LlamaForCausalLM", layer_types=layer_types)
    assert unserved(read_model_folder(path))


def test_a_pool_of_such_a_model_is_made_with_a_warning_in_the_log(tmp_path: Path) -> None:
    path = folder(tmp_path, "MistralForCausalLM", sliding_window=4096)
    (path / "model.safetensors").write_bytes(b"weights")
    flags = {"--model": str(path), "--pool-name": "m", "--socket-dir": "/srv/kvd"}
    (pool,) = load_config(None, {}, flags).pools
    with capture_logs() as logs:
        resolved = resolve_pool(pool)
    assert resolved.model_fingerprint and resolved.layout.num_layers == 2
    (event,) = logs
    assert (event["event"], event["log_level"]) == ("pool.model_unserved", "warning")
    assert event["pool"] == "m" and "sliding_window = 4096" in event["why"]
