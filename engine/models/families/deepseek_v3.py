"""DeepSeek-V3 and R1 (transformers `DeepseekV3ForCausalLM`): multi-head latent attention; dense layers."""

from collections.abc import Mapping
from typing import Any

from lockstep.engine.models.families.family import Family, read_flag, refuse_flags
from lockstep.engine.models.families.latent import LATENT_DECODER_TABLE, parse_mla, refuse_moe_layers


def _parse(raw: Mapping[str, Any]) -> dict[str, Any]:
    refuse_flags(raw, "DeepSeek-V3", "sliding_window", "use_sliding_window", "layer_types", "mlp_bias")
    refuse_moe_layers(raw)
    return {
        "qkv_bias": False,
        "proj_bias": False,
        "mlp_bias": False,
        "qk_norm": False,
        "layer_windows": (None,) * raw["num_hidden_layers"],
        "mla": parse_mla(raw, rope_interleaved=read_flag(raw, "rope_interleave")),
    }


FAMILY = Family(
    model_type="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    defaults={
        "max_position_embeddings": 4096,
        "eos_token_id": 1,
        "num_key_value_heads": 128,
        "first_k_dense_replace": 3,
        "kv_lora_rank": 512,
        "q_lora_rank": 1536,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "rope_interleave": True,
    },
    parse=_parse,
    table=LATENT_DECODER_TABLE,
)
