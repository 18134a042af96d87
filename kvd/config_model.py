"""Which model folders modelworker would refuse, said when kvd starts.

A warning, not a refusal: kvd needs the geometry alone, and that is right for other engines, too.
modelworker's own reading (modelworker/model_config.py) decides; kvd never imports it, and a test
holds the two against each other.
"""

from __future__ import annotations

from collections.abc import Iterator

from kvd_shared.model_folder import ModelFolder

ALWAYS = ("hidden_size", "intermediate_size", "vocab_size")  # keys that a config must have
# architecture -> more of them
SERVED = {
    "LlamaForCausalLM": (),
    "MistralForCausalLM": ("num_key_value_heads",),
    "Qwen2ForCausalLM": ("num_key_value_heads",),
    "Qwen3ForCausalLM": ("num_key_value_heads", "head_dim"),
}
ROPE_TYPES = ("default", "linear", "llama3")


def unserved(folder: ModelFolder) -> list[str]:
    """Why modelworker would refuse the folder, a line a field; empty when nothing is known."""
    return [f"{folder.config.where}: {why}" for why in _reasons(folder)]


def _reasons(folder: ModelFolder) -> Iterator[str]:
    config = folder.config.values
    if folder.architecture not in SERVED:
        yield f"architectures = [{folder.architecture!r}]: served are {', '.join(SERVED)}"
        return  # its fields may mean anything
    for key in (*ALWAYS, *SERVED[folder.architecture]):
        if config.get(key) is None:
            yield f"{key} is missing"
    # absent means 4096 for this family
    window = config.get("sliding_window", "absent")
    if folder.architecture == "MistralForCausalLM" and window is not None:
        yield f"sliding_window = {window}: served is null, full attention"
    if folder.architecture.startswith("Qwen") and config.get("use_sliding_window"):
        yield "use_sliding_window = true: served is false"
    kinds = config.get("layer_types") or []
    for kind in sorted({str(each) for each in (kinds if isinstance(kinds, list) else [kinds])}):
        if kind != "full_attention":
            yield f"layer_types has {kind!r}: served is 'full_attention'"
    if config.get("hidden_act", "silu") != "silu":
        yield f"hidden_act = {config['hidden_act']!r}: served is 'silu'"
    if config.get("quantization_config") is not None:
        yield "quantization_config is set: served are plain weights"
    if config["num_attention_heads"] % folder.num_kv_heads:
        yield "num_attention_heads is no multiple of num_key_value_heads"
    if folder.head_dim % 2:
        yield f"head_dim = {folder.head_dim}: rotary positions need an even one"
    yield from _rope_reasons(folder)


def _rope_reasons(folder: ModelFolder) -> Iterator[str]:
    config = folder.config.values
    key = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    rope = config.get(key) or {}
    if not isinstance(rope, dict):
        yield f"{key} = {rope!r}: must be a map"
        return
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ROPE_TYPES or any(isinstance(value, dict) for value in rope.values()):
        yield f"{key} = {rope}: served are {', '.join(ROPE_TYPES)}, the same for all layers"
    partial = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if partial not in (None, 1):
        yield f"partial_rotary_factor = {partial}: served is 1, whole heads"
