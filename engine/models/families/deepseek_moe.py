"""The mixture-of-experts layers that the DeepSeek families share: all layers from `first_k_dense_replace` on."""

from collections.abc import Mapping
from typing import Any

from lockstep.engine.models.families.reading import read_flag, read_number, read_size, unsupported
from lockstep.engine.models.layers.moe import Experts


def parse_moe_v2(raw: Mapping[str, Any]) -> dict[int, Experts]:
    """DeepSeek-V2: a softmax over all experts, whose weights are not normalised. By layer."""
    if not (layers := _layers(raw)):
        return {}
    method = raw.get("topk_method")
    if method not in ("greedy", "group_limited_greedy"):
        raise unsupported("topk_method", method, "known are greedy and group_limited_greedy")
    if raw.get("scoring_func") not in (None, "softmax"):
        raise unsupported("scoring_func", raw["scoring_func"], "DeepSeek-V2 scores by softmax")
    if read_flag(raw, "norm_topk_prob"):
        raise unsupported("norm_topk_prob", True, "transformers does not normalise DeepSeek-V2's weights")
    if read_flag(raw, "mlp_bias"):
        raise unsupported("mlp_bias", True, "experts are computed without biases")
    groups = _groups(raw) if method == "group_limited_greedy" else {}
    return dict.fromkeys(layers, Experts(**_sizes(raw), **groups))


def parse_moe_v3(raw: Mapping[str, Any]) -> dict[int, Experts]:
    """DeepSeek-V3: sigmoid scores, a bias that takes part in the choice alone, groups by their two best experts."""
    if not (layers := _layers(raw)):
        return {}
    for key, value in (("topk_method", "noaux_tc"), ("scoring_func", "sigmoid")):
        if raw.get(key) not in (None, value):
            raise unsupported(key, raw[key], f"DeepSeek-V3 has {value}")
    experts = Experts(
        scoring="sigmoid",
        has_expert_bias=True,
        group_score="sum_of_top_2",
        normalize_weights=read_flag(raw, "norm_topk_prob"),
        **_sizes(raw),
        **_groups(raw),
    )
    return dict.fromkeys(layers, experts)


def _layers(raw: Mapping[str, Any]) -> tuple[int, ...]:
    num_dense = raw.get("first_k_dense_replace")
    if isinstance(num_dense, bool) or not isinstance(num_dense, int) or num_dense < 0:
        raise unsupported("first_k_dense_replace", num_dense, "expected a number of layers")
    if raw.get("moe_layer_freq") not in (None, 1):
        raise unsupported("moe_layer_freq", raw["moe_layer_freq"], "all layers behind the dense ones have experts")
    return tuple(range(num_dense, raw["num_hidden_layers"]))


def _sizes(raw: Mapping[str, Any]) -> dict[str, Any]:
    num_experts, experts_per_token = read_size(raw, "n_routed_experts"), read_size(raw, "num_experts_per_tok")
    if experts_per_token > num_experts:
        raise unsupported("num_experts_per_tok", experts_per_token, f"there are {num_experts} experts")
    ffn_hidden_size = read_size(raw, "moe_intermediate_size")
    if not (scale := read_number(raw, "routed_scaling_factor")):
        raise unsupported("routed_scaling_factor", scale, "expected a positive number")
    return {
        "num_experts": num_experts,
        "experts_per_token": experts_per_token,
        "ffn_hidden_size": ffn_hidden_size,
        "shared_ffn_hidden_size": ffn_hidden_size * read_size(raw, "n_shared_experts"),
        "weight_scale": scale,
        "fp32_logits": True,
    }


def _groups(raw: Mapping[str, Any]) -> dict[str, Any]:
    num_groups, top_groups = read_size(raw, "n_group"), read_size(raw, "topk_group")
    num_experts, experts_per_token = raw["n_routed_experts"], raw["num_experts_per_tok"]
    if num_experts % num_groups or not 1 <= top_groups <= num_groups:
        raise unsupported("n_group", num_groups, f"{num_experts} experts in groups of which {top_groups} are chosen")
    if experts_per_token > top_groups * (num_experts // num_groups):
        raise unsupported("topk_group", top_groups, f"a token has {experts_per_token} experts")
    return {"num_groups": num_groups, "top_groups": top_groups}
