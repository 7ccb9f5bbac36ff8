"""DeepSeek-V3 and R1 (transformers `DeepseekV3ForCausalLM`): multi-head latent attention, and experts."""

from collections.abc import Mapping
from typing import Any

from lockstep.engine.models.families.deepseek_moe import parse_moe_v3
from lockstep.engine.models.families.family import Family, ModelParts, refuse_flags
from lockstep.engine.models.families.latent import latent_decoder
from lockstep.engine.models.families.reading import read_flag


def _parse(raw: Mapping[str, Any]) -> ModelParts:
    refuse_flags(raw, "DeepSeek-V3", "sliding_window", "use_sliding_window", "layer_types", "mlp_bias")
    interleaved, num_mtp_layers = read_flag(raw, "rope_interleave"), raw["num_nextn_predict_layers"] or 0
    return latent_decoder(raw, interleaved, parse_moe_v3(raw), num_mtp_layers=num_mtp_layers)


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
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 2048,
        "routed_scaling_factor": 2.5,
        "n_group": 8,
        "topk_group": 4,
        "norm_topk_prob": True,
        "rope_interleave": True,
        "num_nextn_predict_layers": 1,
    },
    parse=_parse,
)
