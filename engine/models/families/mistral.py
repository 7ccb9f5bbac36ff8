"""Mistral (transformers `MistralForCausalLM`): Llama without biases, with one sliding window for all layers."""

from collections.abc import Mapping
from typing import Any

from lockstep.engine.models.families.family import Family, ModelParts, attention_decoder, refuse_flags, window_size


def _parse(raw: Mapping[str, Any]) -> ModelParts:
    refuse_flags(raw, "Mistral", "attention_bias", "mlp_bias", "layer_types")
    return attention_decoder(raw, [window_size(raw)] * raw["num_hidden_layers"])


FAMILY = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    defaults={
        "num_key_value_heads": 8,
        "max_position_embeddings": 4096 * 32,
        "sliding_window": 4096,
        "eos_token_id": 2,
    },
    parse=_parse,
)
