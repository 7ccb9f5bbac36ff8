"""Llama 2, 3 and their many relatives (transformers `LlamaForCausalLM`)."""

from collections.abc import Mapping
from typing import Any

from lockstep.engine.models.families.family import Family, ModelParts, attention_decoder, refuse_flags
from lockstep.engine.models.families.reading import read_flag


def _parse(raw: Mapping[str, Any]) -> ModelParts:
    refuse_flags(raw, "Llama", "sliding_window", "use_sliding_window", "layer_types")
    bias, mlp_bias = read_flag(raw, "attention_bias"), read_flag(raw, "mlp_bias")
    windows = [None] * raw["num_hidden_layers"]
    return attention_decoder(raw, windows, qkv_bias=bias, proj_bias=bias, mlp_bias=mlp_bias)


FAMILY = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    defaults={"max_position_embeddings": 2048, "eos_token_id": 2},
    parse=_parse,
)
