"""Qwen3 dense (transformers `Qwen3ForCausalLM`): an RMS norm on each query and key head, no biases unless asked for."""

from collections.abc import Mapping
from typing import Any

from lockstep.engine.models.families.family import (
    DENSE_DECODER_TABLE,
    Family,
    qwen_layer_windows,
    read_flag,
    refuse_flags,
)


def _parse(raw: Mapping[str, Any]) -> dict[str, Any]:
    refuse_flags(raw, "Qwen3", "mlp_bias")
    attention_bias = read_flag(raw, "attention_bias")
    return {
        "qkv_bias": attention_bias,
        "proj_bias": attention_bias,
        "mlp_bias": False,
        "qk_norm": True,
        "layer_windows": qwen_layer_windows(raw),
    }


FAMILY = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    defaults={
        "num_key_value_heads": 32,
        "head_dim": 128,
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
    parse=_parse,
    table=DENSE_DECODER_TABLE,
)
