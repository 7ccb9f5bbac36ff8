"""Qwen2 and Qwen2.5 (transformers `Qwen2ForCausalLM`): biases on q, k and v; optional windows on upper layers."""

from collections.abc import Mapping
from typing import Any

from lockstep.engine.models.families.family import (
    Family,
    ModelParts,
    attention_decoder,
    qwen_layer_windows,
    refuse_flags,
)


def _parse(raw: Mapping[str, Any]) -> ModelParts:
    refuse_flags(raw, "Qwen2", "mlp_bias")
    return attention_decoder(raw, qwen_layer_windows(raw), qkv_bias=True)


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
)
