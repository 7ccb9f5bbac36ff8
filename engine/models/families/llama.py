"""Llama 2, 3 and their many relatives (transformers `LlamaForCausalLM`)."""

from collections.abc import Mapping
from typing import Any

from lockstep.engine.models.families.family import DENSE_DECODER_TABLE, Family, read_flag, refuse_flags


def _parse(raw: Mapping[str, Any]) -> dict[str, Any]:
    refuse_flags(raw, "Llama", "sliding_window", "use_sliding_window", "layer_types")
    attention_bias = read_flag(raw, "attention_bias")
    return {
        "qkv_bias": attention_bias,
        "proj_bias": attention_bias,
        "mlp_bias": read_flag(raw, "mlp_bias"),
        "qk_norm": False,
        "layer_windows": (None,) * raw["num_hidden_layers"],
    }


FAMILY = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    defaults={"max_position_embeddings": 2048, "eos_token_id": 2},
    parse=_parse,
    table=DENSE_DECODER_TABLE,
)
