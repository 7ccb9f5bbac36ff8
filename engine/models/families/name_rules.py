"""Names of parameters here and in transformers, as data: which part of a layer has which, and in which sizes."""

from dataclasses import dataclass, replace
from typing import Any, Literal

from lockstep.engine.models.layers.attention import GroupedAttention
from lockstep.engine.models.layers.latent_attention import LatentAttention
from lockstep.engine.models.layers.mlp import GatedMLP
from lockstep.engine.models.layers.moe import Experts


@dataclass(frozen=True)
class NameRule:
    """One parameter (of every layer, where the names hold `{i}`) under both naming schemes.

    megatron:  the parameter's name inside Lockstep.
    hf:        the tensors of a transformers checkpoint that make it up, in the order that `kind` expects. Where they
               hold `{e}` there are such tensors for every expert, and the parameter is their stack along dim 0.
    kind:      "copy": one tensor, as it is. "qkv": q, k, v merged by query group (a group's query heads, its key head,
               its value head, and so on). "gate_up": gate and up concatenated along dim 0 (of an expert's tensors).
    shape:     names of dimensions: of `part`, see LayerPart.dimensions, and of the model, see names.expand.
    shard_dim: the dimension that tensor parallelism splits: that of the output for column-parallel parameters, of the
               vocabulary for vocabulary-parallel ones, of the input for row-parallel ones, None where every rank holds
               the whole. "qkv" is split between groups; "gate_up" has its two halves split separately. Experts are
               not cut: ranks share them out whole, or each holds all of them.
    part:      the kind of mixer or MLP that has it; None: the layer itself, or the model.
    when:      (attribute of the part or of ModelConfig, value) that must hold for the parameter to exist; None: always.
    fp32:      held in fp32 whatever the model's dtype.
    hf_stacked: the name of all experts' tensors stacked and merged as this parameter is, which some files hold instead.
    """

    megatron: str
    hf: tuple[str, ...]
    shape: tuple[str, ...]
    kind: Literal["copy", "qkv", "gate_up"] = "copy"
    shard_dim: int | None = None
    part: type | None = None
    when: tuple[str, Any] | None = None
    fp32: bool = False
    hf_stacked: str | None = None


_HF = "model.layers.{i}."
_MEGATRON = "decoder.layers.{i}."

_ATTENTION: tuple[NameRule, ...] = (
    NameRule(
        _MEGATRON + "self_attention.linear_qkv.weight",
        (_HF + "self_attn.q_proj.weight", _HF + "self_attn.k_proj.weight", _HF + "self_attn.v_proj.weight"),
        ("qkv", "hidden"),
        kind="qkv",
        shard_dim=0,
    ),
    NameRule(
        _MEGATRON + "self_attention.linear_qkv.bias",
        (_HF + "self_attn.q_proj.bias", _HF + "self_attn.k_proj.bias", _HF + "self_attn.v_proj.bias"),
        ("qkv",),
        kind="qkv",
        shard_dim=0,
        when=("qkv_bias", True),
    ),
    NameRule(
        _MEGATRON + "self_attention.q_layernorm.weight",
        (_HF + "self_attn.q_norm.weight",),
        ("head_dim",),
        when=("has_qk_norm", True),
    ),
    NameRule(
        _MEGATRON + "self_attention.k_layernorm.weight",
        (_HF + "self_attn.k_norm.weight",),
        ("head_dim",),
        when=("has_qk_norm", True),
    ),
    NameRule(
        _MEGATRON + "self_attention.linear_proj.weight",
        (_HF + "self_attn.o_proj.weight",),
        ("hidden", "query"),
        shard_dim=1,
    ),
    NameRule(
        _MEGATRON + "self_attention.linear_proj.bias",
        (_HF + "self_attn.o_proj.bias",),
        ("hidden",),
        when=("proj_bias", True),
    ),
)

_LATENT_ATTENTION: tuple[NameRule, ...] = (
    NameRule(
        _MEGATRON + "self_attention.linear_q_proj.weight",
        (_HF + "self_attn.q_proj.weight",),
        ("mla_query", "hidden"),
        shard_dim=0,
        when=("has_q_lora", False),
    ),
    NameRule(
        _MEGATRON + "self_attention.linear_q_down_proj.weight",
        (_HF + "self_attn.q_a_proj.weight",),
        ("q_lora", "hidden"),
        when=("has_q_lora", True),
    ),
    NameRule(
        _MEGATRON + "self_attention.q_layernorm.weight",
        (_HF + "self_attn.q_a_layernorm.weight",),
        ("q_lora",),
        when=("has_q_lora", True),
    ),
    NameRule(
        _MEGATRON + "self_attention.linear_q_up_proj.weight",
        (_HF + "self_attn.q_b_proj.weight",),
        ("mla_query", "q_lora"),
        shard_dim=0,
        when=("has_q_lora", True),
    ),
    NameRule(
        _MEGATRON + "self_attention.linear_kv_down_proj.weight",
        (_HF + "self_attn.kv_a_proj_with_mqa.weight",),
        ("mla_row", "hidden"),
    ),
    NameRule(
        _MEGATRON + "self_attention.kv_layernorm.weight", (_HF + "self_attn.kv_a_layernorm.weight",), ("kv_lora",)
    ),
    NameRule(
        _MEGATRON + "self_attention.linear_kv_up_proj.weight",
        (_HF + "self_attn.kv_b_proj.weight",),
        ("mla_key_value", "kv_lora"),
        shard_dim=0,
    ),
    NameRule(
        _MEGATRON + "self_attention.linear_proj.weight",
        (_HF + "self_attn.o_proj.weight",),
        ("hidden", "mla_out"),
        shard_dim=1,
    ),
)

_MLP: tuple[NameRule, ...] = (
    NameRule(
        _MEGATRON + "mlp.linear_fc1.weight",
        (_HF + "mlp.gate_proj.weight", _HF + "mlp.up_proj.weight"),
        ("gate_up", "hidden"),
        kind="gate_up",
        shard_dim=0,
    ),
    NameRule(
        _MEGATRON + "mlp.linear_fc1.bias",
        (_HF + "mlp.gate_proj.bias", _HF + "mlp.up_proj.bias"),
        ("gate_up",),
        kind="gate_up",
        shard_dim=0,
        when=("has_bias", True),
    ),
    NameRule(
        _MEGATRON + "mlp.linear_fc2.weight",
        (_HF + "mlp.down_proj.weight",),
        ("hidden", "ffn"),
        shard_dim=1,
    ),
    NameRule(
        _MEGATRON + "mlp.linear_fc2.bias",
        (_HF + "mlp.down_proj.bias",),
        ("hidden",),
        when=("has_bias", True),
    ),
)

# The experts of a layer are one tensor, stacked by index, in the engine and in the trainer: the kernel that multiplies
# all experts' tokens takes it as it is. Megatron's own names for its parts are
# `mlp.experts.local_experts.{e}.linear_fc1.weight` (a module per expert) and `mlp.experts.linear_fc1.weight{e}`
# (grouped); its layout of one expert's weight is ours.
_EXPERTS: tuple[NameRule, ...] = (
    NameRule(_MEGATRON + "mlp.router.weight", (_HF + "mlp.gate.weight",), ("experts", "hidden")),
    NameRule(
        _MEGATRON + "mlp.router.expert_bias",
        (_HF + "mlp.gate.e_score_correction_bias",),
        ("experts",),
        when=("has_expert_bias", True),
        fp32=True,
    ),
    NameRule(
        _MEGATRON + "mlp.experts.linear_fc1.weight",
        (_HF + "mlp.experts.{e}.gate_proj.weight", _HF + "mlp.experts.{e}.up_proj.weight"),
        ("held_experts", "expert_gate_up", "hidden"),
        kind="gate_up",
        hf_stacked=_HF + "mlp.experts.gate_up_proj",
    ),
    NameRule(
        _MEGATRON + "mlp.experts.linear_fc2.weight",
        (_HF + "mlp.experts.{e}.down_proj.weight",),
        ("held_experts", "hidden", "expert_ffn"),
        hf_stacked=_HF + "mlp.experts.down_proj",
    ),
    NameRule(
        _MEGATRON + "mlp.shared_experts.linear_fc1.weight",
        (_HF + "mlp.shared_experts.gate_proj.weight", _HF + "mlp.shared_experts.up_proj.weight"),
        ("shared_gate_up", "hidden"),
        kind="gate_up",
        shard_dim=0,
        when=("has_shared_experts", True),
    ),
    NameRule(
        _MEGATRON + "mlp.shared_experts.linear_fc2.weight",
        (_HF + "mlp.shared_experts.down_proj.weight",),
        ("hidden", "shared_ffn"),
        shard_dim=1,
        when=("has_shared_experts", True),
    ),
)


def _of(part: type, rules: tuple[NameRule, ...]) -> tuple[NameRule, ...]:
    return tuple(replace(rule, part=part) for rule in rules)


# Of all families so far: their parts have the same names. A family with others has rules of its own.
DECODER_RULES: tuple[NameRule, ...] = (
    NameRule("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), ("vocab", "hidden"), shard_dim=0),
    NameRule(_MEGATRON + "input_layernorm.weight", (_HF + "input_layernorm.weight",), ("hidden",)),
    *_of(GroupedAttention, _ATTENTION),
    *_of(LatentAttention, _LATENT_ATTENTION),
    NameRule(_MEGATRON + "pre_mlp_layernorm.weight", (_HF + "post_attention_layernorm.weight",), ("hidden",)),
    *_of(GatedMLP, _MLP),
    *_of(Experts, _EXPERTS),
    NameRule("decoder.final_layernorm.weight", ("model.norm.weight",), ("hidden",)),
    NameRule(
        "output_layer.weight",
        ("lm_head.weight",),
        ("vocab", "hidden"),
        shard_dim=0,
        when=("has_output_matrix", True),
    ),
    NameRule("output_layer.weight", ("score.weight",), ("scores", "hidden"), when=("head", "scalar")),
)
