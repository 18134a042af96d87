from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from kvd_shared.model_folder import BadModelFolder, JsonMap, read_model_folder
from modelworker.model import read_config
from modelworker.model_config import RopeConfig, read_rope
from modelworker.rope import inverse_frequencies

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "hidden_size": 96,
    "intermediate_size": 100,
    "vocab_size": 50,
    "max_position_embeddings": 512,
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def config_folder(path: Path, **changes: Any) -> Path:
    (path / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    return path


def rope(**keys: Any) -> RopeConfig:
    return read_rope(JsonMap("config.json", {"max_position_embeddings": 512, **keys}))


def test_both_spellings_of_rope_settings_mean_the_same() -> None:
    new = rope(rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3})
    old = rope(rope_theta=5e5, rope_scaling={"rope_type": "llama3", **LLAMA3})
    older = rope(rope_theta=5e5, rope_scaling={"type": "llama3", **LLAMA3})
    assert new == old == older
    assert (new.theta, new.original_context) == (5e5, 512)


def test_rope_defaults() -> None:
    plain = RopeConfig(theta=10000.0, type="default")
    assert rope() == rope(rope_scaling=None) == rope(rope_parameters={}) == plain
    assert rope(rope_theta=3e4).theta == 3e4


def test_the_context_of_the_first_training() -> None:
    inside = {"rope_type": "llama3", "original_max_position_embeddings": 64, **LLAMA3}
    assert rope(rope_scaling=inside).original_context == 64
    beside = rope(rope_scaling=inside, original_max_position_embeddings=32)
    assert beside.original_context == 32


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"rope_scaling": {"type": "yarn", "factor": 4}}, "rope_scaling = .*: supported are the"),
        ({"rope_parameters": {"rope_type": "dynamic"}}, "types default, linear, llama3, the same"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "for all layers"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling: factor is missing: must be a number"),
        ({"rope_scaling": [1]}, r"rope_scaling = \[1\]: must be a map"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5: supported is 1"),
    ],
)
def test_rope_settings_that_are_not_supported(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(BadModelFolder, match=message):
        rope(**keys)


def test_llama3_keeps_fast_rotations_slows_slow_ones_and_blends_between() -> None:
    config = RopeConfig(
        theta=1e4,
        type="llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_context=2048.0,
    )
    plain = inverse_frequencies(RopeConfig(theta=1e4, type="default"), 64)
    scaled = inverse_frequencies(config, 64)
    turns = 2048 * plain / (2 * torch.pi)
    assert torch.equal(scaled[turns > 4], plain[turns > 4])
    torch.testing.assert_close(scaled[turns < 1], plain[turns < 1] / 8)
    between = (turns > 1) & (turns < 4)
    assert between.any()
    assert ((scaled > plain / 8) & (scaled < plain))[between].all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"architectures": ["GPT2LMHeadModel"]},
            r"architectures = \['GPT2LMHeadModel'\] is not supported; supported are "
            "LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM",
        ),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu': supported is 'silu'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config = .*: supported is None"),
        ({"num_key_value_heads": 4}, "num_attention_heads = 6 is no multiple of num_key_value_h"),
        ({"head_dim": 15}, "head_dim = 15: rotary positions need an even one"),
        ({"vocab_size": None}, "vocab_size is missing: must be a whole number"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings = 'yes': must be true or false"),
        ({"layer_types": ["sliding_attention"]}, "layer_types has 'sliding_attention': supported"),
        ({"architectures": ["MistralForCausalLM"]}, r"sliding_window = absent \(4096\): supported"),
        (
            {"architectures": ["MistralForCausalLM"], "sliding_window": 128},
            "sliding_window = 128: supported is null, full attention",
        ),
        (
            {"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True},
            "use_sliding_window = true: supported is false",
        ),
        ({"architectures": ["Qwen3ForCausalLM"]}, "head_dim is missing: must be a whole number"),
    ],
)
def test_what_a_config_cannot_mean_here(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    folder = read_model_folder(config_folder(tmp_path, **changes))
    with pytest.raises(BadModelFolder, match=f"config.json: {message}"):
        read_config(folder)
