"""Multi-head latent attention, which the DeepSeek families share: its sizes, and the names of its parameters."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from lockstep.engine.models.families.family import (
    DENSE_DECODER_TABLE,
    NameRule,
    read_flag,
    read_size,
    unsupported,
    with_experts,
)


@dataclass(frozen=True)
class MLAConfig:
    """Sizes of multi-head latent attention, in elements.

    q_lora_rank:      the width that queries are projected down to and up from again; None: they are projected at once.
    kv_lora_rank:     the latent's width, of which every head makes its keys and values.
    qk_nope_head_dim: a head's query and key elements that are not rotated.
    qk_rope_head_dim: those that are; the key's are the same for all heads.
    v_head_dim:       a head's value elements.
    rope_interleaved: rotated elements lie in pairs, not in halves.
    softmax_scale:    of the scores.
    norm_eps:         of the norms of the projected-down queries and the latent; transformers, as DeepSeek's own code,
                      does not give them config.json's rms_norm_eps.
    """

    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    rope_interleaved: bool
    softmax_scale: float
    norm_eps: float = 1e-6

    @property
    def row_width(self) -> int:
        """Elements that the cache holds per token and layer: the latent, and the key's rotated part."""
        return self.kv_lora_rank + self.qk_rope_head_dim


def parse_mla(raw: Mapping[str, Any], rope_interleaved: bool) -> MLAConfig:
    """The sizes of config.json. Raises UnsupportedModelError."""

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
    return MLAConfig(
        q_lora_rank=None if raw.get("q_lora_rank") is None else read_size(raw, "q_lora_rank"),
        kv_lora_rank=read_size(raw, "kv_lora_rank"),
        qk_nope_head_dim=nope_dim,
        qk_rope_head_dim=rope_dim,
        v_head_dim=read_size(raw, "v_head_dim"),
        rope_interleaved=rope_interleaved,
        softmax_scale=(nope_dim + rope_dim) ** -0.5,
    )


def with_mscale(mla: MLAConfig, rope_scaling: Mapping[str, Any] | None) -> MLAConfig:
    """YaRN's correction of the softmax: mscale_all_dim widens the scores' scale for a longer context, squared because
    both the query and the key would bear it (the table of cosines and sines bears what mscale asks beyond it)."""
    mscale_all_dim = (rope_scaling or {}).get("mscale_all_dim")
    if not mscale_all_dim or rope_scaling["factor"] <= 1:
        return mla
    mscale = 0.1 * mscale_all_dim * math.log(rope_scaling["factor"]) + 1.0
    return replace(mla, softmax_scale=mla.softmax_scale * mscale * mscale)


_HF = "model.layers.{i}.self_attn."
_MEGATRON = "decoder.layers.{i}.self_attention."

ATTENTION_TABLE: tuple[NameRule, ...] = (
    NameRule(
        _MEGATRON + "linear_q_proj.weight",
        (_HF + "q_proj.weight",),
        ("mla_query", "hidden"),
        shard_dim=0,
        when=("has_q_lora", False),
    ),
    NameRule(
        _MEGATRON + "linear_q_down_proj.weight",
        (_HF + "q_a_proj.weight",),
        ("q_lora", "hidden"),
        when=("has_q_lora", True),
    ),
    NameRule(_MEGATRON + "q_layernorm.weight", (_HF + "q_a_layernorm.weight",), ("q_lora",), when=("has_q_lora", True)),
    NameRule(
        _MEGATRON + "linear_q_up_proj.weight",
        (_HF + "q_b_proj.weight",),
        ("mla_query", "q_lora"),
        shard_dim=0,
        when=("has_q_lora", True),
    ),
    NameRule(_MEGATRON + "linear_kv_down_proj.weight", (_HF + "kv_a_proj_with_mqa.weight",), ("mla_row", "hidden")),
    NameRule(_MEGATRON + "kv_layernorm.weight", (_HF + "kv_a_layernorm.weight",), ("kv_lora",)),
    NameRule(
        _MEGATRON + "linear_kv_up_proj.weight", (_HF + "kv_b_proj.weight",), ("mla_key_value", "kv_lora"), shard_dim=0
    ),
    NameRule(_MEGATRON + "linear_proj.weight", (_HF + "o_proj.weight",), ("hidden", "mla_out"), shard_dim=1),
)


def with_latent_attention(table: tuple[NameRule, ...]) -> tuple[NameRule, ...]:
    """A decoder's table with these parameters in the place of its self-attention's."""
    place = next(i for i, rule in enumerate(table) if rule.megatron.startswith(_MEGATRON))
    others = [rule for rule in table if not rule.megatron.startswith(_MEGATRON)]
    return (*others[:place], *ATTENTION_TABLE, *others[place:])


LATENT_DECODER_TABLE = with_experts(with_latent_attention(DENSE_DECODER_TABLE))
