"""Qwen3 dense (transformers `Qwen3ForCausalLM`): an RMS norm on each query and key head, no biases unless asked for."""

from collections.abc import Mapping
from typing import Any

from lockstep.engine.models.families.family import (
    Family,
    ModelParts,
    attention_decoder,
    qwen_layer_windows,
    refuse_flags,
)
from lockstep.engine.models.families.reading import read_flag


def _parse(raw: Mapping[str, Any]) -> ModelParts:
    refuse_flags(raw, "Qwen3", "mlp_bias")
    bias = read_flag(raw, "attention_bias")
    return attention_decoder(raw, qwen_layer_windows(raw), qkv_bias=bias, proj_bias=bias, qk_norm=True)


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
)
