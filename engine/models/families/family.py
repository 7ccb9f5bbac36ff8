"""What a model family is: how its config.json becomes layers, and the names of its parameters."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lockstep.engine.models.families.name_rules import DECODER_RULES, NameRule
from lockstep.engine.models.families.reading import read_flag, read_norm, read_size, unsupported
from lockstep.engine.models.families.rope_keys import read_rope
from lockstep.engine.models.layers.attention import GroupedAttention
from lockstep.engine.models.layers.layer import LayerSpec
from lockstep.engine.models.layers.mlp import GatedMLP
from lockstep.engine.models.layers.moe import Experts
from lockstep.engine.models.layers.rope import RopeSpec

ROPE = "rope"  # the one table of most models


@dataclass(frozen=True)
class ModelParts:
    """The fields of ModelConfig in which families differ."""

    layers: tuple[LayerSpec, ...]
    ropes: dict[str, RopeSpec]
    num_mtp_layers: int = 0


@dataclass(frozen=True)
class Family:
    """A model family, as named by `model_type` in config.json.

    defaults: values that transformers takes for keys which config.json leaves out.
    parse:    config.json with the defaults filled in -> its layers. num_hidden_layers and max_position_embeddings have
              been checked. Raises UnsupportedModelError.
    rules:    the names of the parameters.
    """

    model_type: str
    architecture: str
    defaults: Mapping[str, Any]
    parse: Callable[[Mapping[str, Any]], ModelParts]
    rules: tuple[NameRule, ...] = DECODER_RULES


def attention_decoder(
    raw: Mapping[str, Any],
    windows: Sequence[int | None],
    *,
    qkv_bias: bool = False,
    proj_bias: bool = False,
    mlp_bias: bool = False,
    qk_norm: bool = False,
    experts: Mapping[int, Experts] | None = None,
) -> ModelParts:
    """Layers of GroupedAttention that differ in their windows, and in which of them have experts in the MLP's place."""
    norm, num_heads = read_norm(raw), read_size(raw, "num_attention_heads")
    num_kv_heads, head_dim = _kv_heads_and_head_dim(raw, num_heads)
    mlp = GatedMLP(read_size(raw, "intermediate_size"), mlp_bias)

    def layer(number: int, window: int | None) -> LayerSpec:
        mixer = GroupedAttention(
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            rope=ROPE,
            window=window,
            qkv_bias=qkv_bias,
            proj_bias=proj_bias,
            qk_norm=norm if qk_norm else None,
        )
        return LayerSpec(mixer, (experts or {}).get(number, mlp), norm)

    layers = tuple(layer(number, window) for number, window in enumerate(windows))
    return ModelParts(layers, {ROPE: read_rope(raw, head_dim)})


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


def _kv_heads_and_head_dim(raw: Mapping[str, Any], num_heads: int) -> tuple[int, int]:
    num_kv_heads = num_heads if raw.get("num_key_value_heads") is None else read_size(raw, "num_key_value_heads")
    if num_heads % num_kv_heads:
        raise unsupported("num_key_value_heads", num_kv_heads, f"it does not divide num_attention_heads = {num_heads}")
    hidden_size = read_size(raw, "hidden_size")
    if raw.get("head_dim") is not None:
        head_dim = read_size(raw, "head_dim")
    elif hidden_size % num_heads == 0:
        head_dim = hidden_size // num_heads
    else:
        raise unsupported(
            "hidden_size", hidden_size, f"without head_dim, num_attention_heads = {num_heads} must divide it"
        )
    if head_dim % 2:
        raise unsupported("head_dim", head_dim, "rotary embeddings need an even number")
    return num_kv_heads, head_dim
