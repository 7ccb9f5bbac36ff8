"""Multi-head latent attention, which the DeepSeek families share: its keys in config.json."""

import math
from collections.abc import Mapping
from typing import Any

from lockstep.engine.models.families.family import ROPE, ModelParts
from lockstep.engine.models.families.reading import read_flag, read_norm, read_size, unsupported
from lockstep.engine.models.families.rope_keys import read_rope
from lockstep.engine.models.layers.latent_attention import LatentAttention
from lockstep.engine.models.layers.layer import LayerSpec
from lockstep.engine.models.layers.mlp import GatedMLP
from lockstep.engine.models.layers.moe import Experts
from lockstep.engine.models.layers.norm import NormSpec

_NORM = NormSpec(1e-6)  # transformers, as DeepSeek's own code, does not give these norms config.json's rms_norm_eps


def latent_decoder(
    raw: Mapping[str, Any],
    rope_interleaved: bool,
    experts: Mapping[int, Experts],
    mlp_bias: bool = False,
    num_mtp_layers: int = 0,
) -> ModelParts:
    """Layers of LatentAttention, some with experts in the MLP's place. Raises UnsupportedModelError."""
    num_heads = read_size(raw, "num_attention_heads")
    if read_flag(raw, "attention_bias"):
        raise unsupported("attention_bias", True, "latent attention is computed without biases")
    num_kv_heads = raw.get("num_key_value_heads")
    if num_kv_heads not in (None, raw.get("num_attention_heads")):
        raise unsupported("num_key_value_heads", num_kv_heads, "latent attention has a key for each attention head")
    rope_dim = read_size(raw, "qk_rope_head_dim")
    if rope_dim % 2:
        raise unsupported("qk_rope_head_dim", rope_dim, "rotary embeddings need an even number")
    if raw.get("head_dim") not in (None, rope_dim):
        raise unsupported("head_dim", raw["head_dim"], f"it must be qk_rope_head_dim = {rope_dim}")
    nope_dim = read_size(raw, "qk_nope_head_dim")
    rope = read_rope(raw, rope_dim)
    mscale = _mscale(rope.scaling)
    mixer = LatentAttention(
        num_heads=num_heads,
        q_lora_rank=None if raw.get("q_lora_rank") is None else read_size(raw, "q_lora_rank"),
        kv_lora_rank=read_size(raw, "kv_lora_rank"),
        qk_nope_head_dim=nope_dim,
        qk_rope_head_dim=rope_dim,
        v_head_dim=read_size(raw, "v_head_dim"),
        rope=ROPE,
        rope_interleaved=rope_interleaved,
        norm=_NORM,
        softmax_scale=(nope_dim + rope_dim) ** -0.5 * mscale * mscale,
    )
    norm, mlp = read_norm(raw), GatedMLP(read_size(raw, "intermediate_size"), mlp_bias)
    layers = tuple(LayerSpec(mixer, experts.get(number, mlp), norm) for number in range(raw["num_hidden_layers"]))
    return ModelParts(layers, {ROPE: rope}, num_mtp_layers)


def _mscale(rope_scaling: Mapping[str, Any] | None) -> float:
    """YaRN's correction of the softmax: mscale_all_dim widens the scores' scale for a longer context, squared because
    both the query and the key would bear it (the table of cosines and sines bears what mscale asks beyond it)."""
    mscale_all_dim = (rope_scaling or {}).get("mscale_all_dim")
    if not mscale_all_dim or rope_scaling["factor"] <= 1:
        return 1.0
    return 0.1 * mscale_all_dim * math.log(rope_scaling["factor"]) + 1.0
