"""DeepSeek-V2 (transformers `DeepseekV2ForCausalLM`): multi-head latent attention, and experts."""

from collections.abc import Mapping
from typing import Any

from lockstep.engine.models.families.deepseek_moe import parse_moe_v2
from lockstep.engine.models.families.family import Family, ModelParts, refuse_flags
from lockstep.engine.models.families.latent import latent_decoder
from lockstep.engine.models.families.reading import read_flag


def _parse(raw: Mapping[str, Any]) -> ModelParts:
    refuse_flags(raw, "DeepSeek-V2", "sliding_window", "use_sliding_window", "layer_types", "rope_interleave")
    return latent_decoder(raw, True, parse_moe_v2(raw), mlp_bias=read_flag(raw, "mlp_bias"))


FAMILY = Family(
    model_type="deepseek_v2",
    architecture="DeepseekV2ForCausalLM",
    defaults={
        "max_position_embeddings": 2048,
        "eos_token_id": 2,
        "first_k_dense_replace": 0,
        "kv_lora_rank": 512,
        "q_lora_rank": 1536,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "moe_intermediate_size": 1407,
        "routed_scaling_factor": 1.0,
        "topk_method": "greedy",
    },
    parse=_parse,
)
