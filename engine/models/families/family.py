"""What a model family is: how its config.json is read, and the names of its parameters here and in transformers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class NameRule:
    """One parameter (of every layer, where the names hold `{i}`) under both naming schemes.

    megatron:  the parameter's name inside Lockstep.
    hf:        the tensors of a transformers checkpoint that make it up, in the order that `kind` expects. Where they
               hold `{e}` there are such tensors for every expert, and the parameter is their stack along dim 0.
    kind:      "copy": one tensor, as it is. "qkv": q, k, v merged by query group (a group's query heads, its key head,
               its value head, and so on). "gate_up": gate and up concatenated along dim 0 (of an expert's tensors).
    shape:     names of dimensions, see `names.dimensions`.
    shard_dim: the dimension that tensor parallelism splits: that of the output for column-parallel parameters, of the
               vocabulary for vocabulary-parallel ones, of the input for row-parallel ones, None where every rank holds
               the whole. "qkv" is split between groups; "gate_up" has its two halves split separately. Experts are
               not cut: ranks share them out whole, or each holds all of them.
    layers:    the layers that have it: "all", "dense" (those with one MLP), "moe" (those with experts).
    when:      (ModelConfig attribute, value) that must hold for the parameter to exist; None if it always does.
    fp32:      held in fp32 whatever the model's dtype.
    hf_stacked: the name of all experts' tensors stacked and merged as this parameter is, which some files hold instead.
    """

    megatron: str
    hf: tuple[str, ...]
    shape: tuple[str, ...]
    kind: Literal["copy", "qkv", "gate_up"] = "copy"
    shard_dim: int | None = None
    layers: Literal["all", "dense", "moe"] = "all"
    when: tuple[str, bool | str] | None = None
    fp32: bool = False
    hf_stacked: str | None = None


@dataclass(frozen=True)
class Family:
    """A model family, as named by `model_type` in config.json.

    defaults: values that transformers takes for keys which config.json leaves out.
    parse:    config.json with the defaults filled in -> the ModelConfig fields in which families differ: qkv_bias,
              proj_bias, mlp_bias, qk_norm, layer_windows, moe if it has experts, and mla if its attention is latent.
              Raises UnsupportedModelError.
    table:    the names, as data.
    """

    model_type: str
    architecture: str
    defaults: Mapping[str, Any]
    parse: Callable[[Mapping[str, Any]], dict[str, Any]]
    table: tuple[NameRule, ...]


class UnsupportedModelError(ValueError):
    """config.json asks for something that the engine does not compute; the message names the key and its value."""


# Beyond what any published model has; what is larger is a mistake or an attack, and would be allocated.
MAX_SIZE = 1 << 24
MAX_LAYERS = 1 << 12
MAX_POSITIONS = 1 << 22
MAX_NUMBER = 1e12
MAX_EXPERT_MLPS = 1 << 17  # over all layers
_SHOWN = 80


def unsupported(key: str, value: object, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"config.json: {key} = {shown(value)} is not supported: {reason}")


def shown(value: object) -> str:
    """A foreign value for a message: printable, of one line, and short."""
    text = ascii(value) if not isinstance(value, int) or abs(value) < 1 << 64 else "an integer beyond 64 bits"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def printable(name: str) -> str:
    """A foreign name for a message: as it is, where that is printable."""
    return name if name.isascii() and name.isprintable() and len(name) <= 2 * _SHOWN else shown(name)


def read_flag(raw: Mapping[str, Any], key: str) -> bool:
    """The boolean at `key`; False where it is absent or null."""
    value = raw.get(key)
    if value not in (None, True, False):
        raise unsupported(key, value, "expected true or false")
    return bool(value)


def read_size(raw: Mapping[str, Any], key: str, largest: int = MAX_SIZE) -> int:
    """The positive integer at `key`."""
    value = raw.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= largest:
        raise unsupported(key, value, f"expected a positive integer, at most {largest}")
    return value


def read_number(raw: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """The finite number at `key`, at least 0."""
    value = raw.get(key, default)
    if not is_number(value):
        raise unsupported(key, value, "expected a finite number, at least 0")
    return float(value)


def is_number(value: object) -> bool:
    """Whether it is a number of at least 0, and of a size that arithmetic in fp32 can bear."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= MAX_NUMBER


def refuse_flags(raw: Mapping[str, Any], family: str, *keys: str) -> None:
    """Refuses keys that transformers would ignore for this family: the checkpoint's author meant something by them."""
    for key in keys:
        if raw.get(key):
            raise unsupported(key, raw[key], f"{family} models do not have it")


def window_size(raw: Mapping[str, Any]) -> int | None:
    """The `sliding_window` of config.json, in tokens; None where it is null."""
    window = raw.get("sliding_window")
    return None if window is None else read_size(raw, "sliding_window", largest=1 << 31)


def qwen_layer_windows(raw: Mapping[str, Any]) -> tuple[int | None, ...]:
    """Windows per layer from `layer_types`, or without it from `use_sliding_window` and `max_window_layers`."""
    num_layers = raw["num_hidden_layers"]
    window = window_size(raw) if read_flag(raw, "use_sliding_window") else None
    layer_types = raw.get("layer_types")
    if layer_types is None:
        if window is None:
            return (None,) * num_layers
        first_sliding = raw["max_window_layers"]
        if not isinstance(first_sliding, int):
            raise unsupported("max_window_layers", first_sliding, "expected a number of layers")
        return tuple(window if layer >= first_sliding else None for layer in range(num_layers))
    if not isinstance(layer_types, list) or len(layer_types) != num_layers:
        raise unsupported("layer_types", layer_types, f"expected one entry for each of the {num_layers} layers")
    for layer_type in layer_types:
        if layer_type not in ("full_attention", "sliding_attention"):
            raise unsupported("layer_types", layer_type, "expected full_attention or sliding_attention")
    if window is None and "sliding_attention" in layer_types:
        raise unsupported("layer_types", "sliding_attention", "use_sliding_window is off or sliding_window is null")
    return tuple(window if layer_type == "sliding_attention" else None for layer_type in layer_types)


_HF = "model.layers.{i}."
_MEGATRON = "decoder.layers.{i}."

DENSE_DECODER_TABLE: tuple[NameRule, ...] = (
    NameRule("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), ("vocab", "hidden"), shard_dim=0),
    NameRule(_MEGATRON + "input_layernorm.weight", (_HF + "input_layernorm.weight",), ("hidden",)),
    NameRule(
        _MEGATRON + "self_attention.linear_qkv.weight",
        (_HF + "self_attn.q_proj.weight", _HF + "self_attn.k_proj.weight", _HF + "self_attn.v_proj.weight"),
        ("qkv", "hidden"),
        kind="qkv",
        shard_dim=0,
    ),
    NameRule(
        _MEGATRON + "self_attention.linear_qkv.bias",
        (_HF + "self_attn.q_proj.bias", _HF + "self_attn.k_proj.bias", _HF + "self_attn.v_proj.bias"),
        ("qkv",),
        kind="qkv",
        shard_dim=0,
        when=("qkv_bias", True),
    ),
    NameRule(
        _MEGATRON + "self_attention.q_layernorm.weight",
        (_HF + "self_attn.q_norm.weight",),
        ("head_dim",),
        when=("qk_norm", True),
    ),
    NameRule(
        _MEGATRON + "self_attention.k_layernorm.weight",
        (_HF + "self_attn.k_norm.weight",),
        ("head_dim",),
        when=("qk_norm", True),
    ),
    NameRule(
        _MEGATRON + "self_attention.linear_proj.weight",
        (_HF + "self_attn.o_proj.weight",),
        ("hidden", "query"),
        shard_dim=1,
    ),
    NameRule(
        _MEGATRON + "self_attention.linear_proj.bias",
        (_HF + "self_attn.o_proj.bias",),
        ("hidden",),
        when=("proj_bias", True),
    ),
    NameRule(_MEGATRON + "pre_mlp_layernorm.weight", (_HF + "post_attention_layernorm.weight",), ("hidden",)),
    NameRule(
        _MEGATRON + "mlp.linear_fc1.weight",
        (_HF + "mlp.gate_proj.weight", _HF + "mlp.up_proj.weight"),
        ("gate_up", "hidden"),
        kind="gate_up",
        shard_dim=0,
        layers="dense",
    ),
    NameRule(
        _MEGATRON + "mlp.linear_fc1.bias",
        (_HF + "mlp.gate_proj.bias", _HF + "mlp.up_proj.bias"),
        ("gate_up",),
        kind="gate_up",
        shard_dim=0,
        layers="dense",
        when=("mlp_bias", True),
    ),
    NameRule(
        _MEGATRON + "mlp.linear_fc2.weight",
        (_HF + "mlp.down_proj.weight",),
        ("hidden", "ffn"),
        shard_dim=1,
        layers="dense",
    ),
    NameRule(
        _MEGATRON + "mlp.linear_fc2.bias",
        (_HF + "mlp.down_proj.bias",),
        ("hidden",),
        layers="dense",
        when=("mlp_bias", True),
    ),
    NameRule("decoder.final_layernorm.weight", ("model.norm.weight",), ("hidden",)),
    NameRule(
        "output_layer.weight",
        ("lm_head.weight",),
        ("vocab", "hidden"),
        shard_dim=0,
        when=("has_output_matrix", True),
    ),
    NameRule("output_layer.weight", ("score.weight",), ("scores", "hidden"), when=("head", "scalar")),
)

# The experts of a layer are one tensor, stacked by index, in the engine and in the trainer: the kernel that multiplies
# all experts' tokens takes it as it is. Megatron's own names for its parts are
# `mlp.experts.local_experts.{e}.linear_fc1.weight` (a module per expert) and `mlp.experts.linear_fc1.weight{e}`
# (grouped); its layout of one expert's weight is ours.
MOE_TABLE: tuple[NameRule, ...] = (
    NameRule(_MEGATRON + "mlp.router.weight", (_HF + "mlp.gate.weight",), ("experts", "hidden"), layers="moe"),
    NameRule(
        _MEGATRON + "mlp.router.expert_bias",
        (_HF + "mlp.gate.e_score_correction_bias",),
        ("experts",),
        layers="moe",
        when=("moe.has_expert_bias", True),
        fp32=True,
    ),
    NameRule(
        _MEGATRON + "mlp.experts.linear_fc1.weight",
        (_HF + "mlp.experts.{e}.gate_proj.weight", _HF + "mlp.experts.{e}.up_proj.weight"),
        ("held_experts", "expert_gate_up", "hidden"),
        kind="gate_up",
        layers="moe",
        hf_stacked=_HF + "mlp.experts.gate_up_proj",
    ),
    NameRule(
        _MEGATRON + "mlp.experts.linear_fc2.weight",
        (_HF + "mlp.experts.{e}.down_proj.weight",),
        ("held_experts", "hidden", "expert_ffn"),
        layers="moe",
        hf_stacked=_HF + "mlp.experts.down_proj",
    ),
    NameRule(
        _MEGATRON + "mlp.shared_experts.linear_fc1.weight",
        (_HF + "mlp.shared_experts.gate_proj.weight", _HF + "mlp.shared_experts.up_proj.weight"),
        ("shared_gate_up", "hidden"),
        kind="gate_up",
        shard_dim=0,
        layers="moe",
        when=("moe.has_shared_experts", True),
    ),
    NameRule(
        _MEGATRON + "mlp.shared_experts.linear_fc2.weight",
        (_HF + "mlp.shared_experts.down_proj.weight",),
        ("hidden", "shared_ffn"),
        shard_dim=1,
        layers="moe",
        when=("moe.has_shared_experts", True),
    ),
)


def with_experts(table: tuple[NameRule, ...]) -> tuple[NameRule, ...]:
    """A dense decoder's table with MOE_TABLE after the other rules of a layer."""
    end_of_layer = 1 + max(index for index, rule in enumerate(table) if "{i}" in rule.megatron)
    return table[:end_of_layer] + MOE_TABLE + table[end_of_layer:]
