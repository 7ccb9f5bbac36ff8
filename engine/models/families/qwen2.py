"""Qwen2 and Qwen2.5 (transformers `Qwen2ForCausalLM`): biases on q, k and v; optional windows on upper layers."""

from collections.abc import Mapping
from typing import Any

from lockstep.engine.models.families.family import DENSE_DECODER_TABLE, Family, qwen_layer_windows, refuse_flags


def _parse(raw: Mapping[str, Any]) -> dict[str, Any]:
    refuse_flags(raw, "Qwen2", "mlp_bias")
    return {
        "qkv_bias": True,
        "proj_bias": False,
        "mlp_bias": False,
        "qk_norm": False,
        "layer_windows": qwen_layer_windows(raw),
    }


FAMILY = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    defaults={
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
    parse=_parse,
    table=DENSE_DECODER_TABLE,
)
