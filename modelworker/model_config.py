"""config.json of the Llama family as one frozen value; what it cannot mean is refused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kvd_shared.layout import PoolLayout
from kvd_shared.model_folder import BadModelFolder, JsonMap, ModelFolder

ROPE_TYPES = ("default", "linear", "llama3")
DEFAULT_THETA = 10000.0
ORIGINAL_CONTEXT = "original_max_position_embeddings"


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """How positions turn into rotations. The last four are used by the type that has them."""

    theta: float
    type: str  # one of ROPE_TYPES
    factor: float = 1.0  # linear, llama3
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 1.0  # llama3
    original_context: float = 0.0  # llama3, tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A decoder of Llama's shape: RMS norms, rotary positions, grouped heads, a gated SiLU MLP."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    context_length: int  # tokens
    rms_eps: float
    rope: RopeConfig
    tied: bool  # the lm head is the embedding
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool  # RMS norm of each query and key head before the rotation

    def layout(self, page_size: int, dtype: str = "float32") -> PoolLayout:
        """The layout of a pool for this model alone."""
        return PoolLayout(
            num_layers=self.num_layers,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            page_size=page_size,
            dtype=dtype,
        )


def read_llama(folder: ModelFolder) -> ModelConfig:
    """LlamaForCausalLM. Raises BadModelFolder."""
    bias = folder.config.flag("attention_bias", False)
    mlp_bias = folder.config.flag("mlp_bias", False)
    return _read(folder, qkv_bias=bias, o_bias=bias, mlp_bias=mlp_bias)


def read_mistral(folder: ModelFolder) -> ModelConfig:
    """MistralForCausalLM, without a sliding window. Raises BadModelFolder."""
    _require(folder.config, "num_key_value_heads")
    # an absent window means 4096 to transformers; only null says that there is none
    window = folder.config.values.get("sliding_window", "absent (4096)")
    if window is not None:
        raise BadModelFolder(
            f"{folder.config.where}: sliding_window = {window}: supported is null, full attention"
        )
    return _read(folder)


def read_qwen2(folder: ModelFolder) -> ModelConfig:
    """Qwen2ForCausalLM, without a sliding window. Raises BadModelFolder."""
    _require(folder.config, "num_key_value_heads")
    _refuse_window(folder.config)
    return _read(folder, qkv_bias=True)


def read_qwen3(folder: ModelFolder) -> ModelConfig:
    """Qwen3ForCausalLM, without a sliding window. Raises BadModelFolder."""
    _require(folder.config, "num_key_value_heads", "head_dim")
    _refuse_window(folder.config)
    bias = folder.config.flag("attention_bias", False)
    return _read(folder, qkv_bias=bias, o_bias=bias, qk_norm=True)


def _require(config: JsonMap, *keys: str) -> None:
    """The keys whose defaults differ between families must be there."""
    for key in keys:
        config.whole(key)


def _refuse_window(config: JsonMap) -> None:
    if config.flag("use_sliding_window", False):
        raise BadModelFolder(f"{config.where}: use_sliding_window = true: supported is false")


def _read(
    folder: ModelFolder,
    *,
    qkv_bias: bool = False,
    o_bias: bool = False,
    mlp_bias: bool = False,
    qk_norm: bool = False,
) -> ModelConfig:
    config = folder.config
    _only(config, "hidden_act", "silu")
    _only(config, "quantization_config", None)
    for layer_type in config.values.get("layer_types") or ():
        if layer_type != "full_attention":
            raise BadModelFolder(
                f"{config.where}: layer_types has {layer_type!r}: supported is 'full_attention'"
            )
    num_heads = config.whole("num_attention_heads")
    if num_heads % folder.num_kv_heads:
        raise BadModelFolder(
            f"{config.where}: num_attention_heads = {num_heads} is no multiple of "
            f"num_key_value_heads = {folder.num_kv_heads}"
        )
    if folder.head_dim % 2:
        raise BadModelFolder(
            f"{config.where}: head_dim = {folder.head_dim}: rotary positions need an even one"
        )
    return ModelConfig(
        num_layers=folder.num_layers,
        hidden_size=config.whole("hidden_size"),
        intermediate_size=config.whole("intermediate_size"),
        vocab_size=config.whole("vocab_size"),
        num_heads=num_heads,
        num_kv_heads=folder.num_kv_heads,
        head_dim=folder.head_dim,
        context_length=folder.context_length,
        rms_eps=config.number("rms_norm_eps", 1e-6),
        rope=read_rope(config),
        tied=config.flag("tie_word_embeddings", False),
        qkv_bias=qkv_bias,
        o_bias=o_bias,
        mlp_bias=mlp_bias,
        qk_norm=qk_norm,
    )


def read_rope(config: JsonMap) -> RopeConfig:
    """Rotary settings: `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` (4).

    Raises BadModelFolder for a type that is not in ROPE_TYPES.
    """
    # with both present transformers 5 lets rope_scaling win, when it says anything
    key = "rope_scaling" if config.values.get("rope_scaling") else "rope_parameters"
    rope = config.submap(key)
    kind = rope.values.get("rope_type") or rope.values.get("type") or "default"
    if kind not in ROPE_TYPES or any(isinstance(value, dict) for value in rope.values.values()):
        raise BadModelFolder(
            f"{rope.where} = {rope.values}: supported are the types {', '.join(ROPE_TYPES)}, "
            "the same for all layers"
        )
    partial = rope.number("partial_rotary_factor", config.number("partial_rotary_factor", 1.0))
    if partial != 1.0:
        raise BadModelFolder(
            f"{config.where}: partial_rotary_factor = {partial}: supported is 1, whole heads"
        )
    theta = rope.number("rope_theta", config.number("rope_theta", DEFAULT_THETA))
    if kind == "default":
        return RopeConfig(theta=theta, type=kind)
    if kind == "linear":
        return RopeConfig(theta=theta, type=kind, factor=rope.number("factor"))
    # transformers' order: beside the rope settings, inside them, the context itself
    trained = rope.number(ORIGINAL_CONTEXT, config.number("max_position_embeddings"))
    return RopeConfig(
        theta=theta,
        type=kind,
        factor=rope.number("factor"),
        low_freq_factor=rope.number("low_freq_factor"),
        high_freq_factor=rope.number("high_freq_factor"),
        original_context=config.number(ORIGINAL_CONTEXT, trained),
    )


def _only(config: JsonMap, key: str, supported: Any) -> None:
    value = config.values.get(key, supported)
    if value != supported:
        raise BadModelFolder(f"{config.where}: {key} = {value!r}: supported is {supported!r}")
