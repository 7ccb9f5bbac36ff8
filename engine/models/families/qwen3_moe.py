"""Qwen3 with mixture-of-experts layers (transformers `Qwen3MoeForCausalLM`): Qwen3's attention, no shared experts."""

from collections.abc import Mapping
from typing import Any

from lockstep.engine.models.families.family import Family, ModelParts, attention_decoder, refuse_flags, window_size
from lockstep.engine.models.families.reading import read_flag, read_size, unsupported
from lockstep.engine.models.layers.moe import Experts


def _parse(raw: Mapping[str, Any]) -> ModelParts:
    refuse_flags(raw, "Qwen3-MoE", "mlp_bias", "layer_types", "shared_expert_intermediate_size", "n_shared_experts")
    bias = read_flag(raw, "attention_bias")
    window = window_size(raw) if read_flag(raw, "use_sliding_window") else None
    experts = dict.fromkeys(_expert_layers(raw), _parse_experts(raw))
    windows = [window] * raw["num_hidden_layers"]
    return attention_decoder(raw, windows, qkv_bias=bias, proj_bias=bias, qk_norm=True, experts=experts)


def _parse_experts(raw: Mapping[str, Any]) -> Experts:
    # transformers 5.17 writes num_local_experts where the published models have num_experts.
    experts_key = "num_local_experts" if raw.get("num_local_experts") is not None else "num_experts"
    num_experts = read_size(raw, experts_key)
    experts_per_token = read_size(raw, "num_experts_per_tok")
    if experts_per_token > num_experts:
        raise unsupported("num_experts_per_tok", experts_per_token, f"there are {num_experts} experts")
    return Experts(
        num_experts=num_experts,
        experts_per_token=experts_per_token,
        ffn_hidden_size=read_size(raw, "moe_intermediate_size"),
        normalize_weights=read_flag(raw, "norm_topk_prob"),
    )


def _expert_layers(raw: Mapping[str, Any]) -> tuple[int, ...]:
    every = read_size(raw, "decoder_sparse_step")
    dense = raw.get("mlp_only_layers") or []
    num_layers = raw["num_hidden_layers"]
    if not isinstance(dense, list) or any(not isinstance(i, int) or not 0 <= i < num_layers for i in dense):
        raise unsupported("mlp_only_layers", dense, f"expected a list of layers from 0 to {num_layers - 1}")
    return tuple(layer for layer in range(num_layers) if layer not in dense and (layer + 1) % every == 0)


FAMILY = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    defaults={
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
        "decoder_sparse_step": 1,
        "moe_intermediate_size": 768,
        "num_experts_per_tok": 8,
        "num_experts": 128,
    },
    parse=_parse,
)
