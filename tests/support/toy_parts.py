"""A format of linear layers and two kinds of layer parts that Lockstep does not have, added through its seams alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partialmethod
from typing import Any

import torch
from torch import nn

from lockstep.engine.memory.layer_caches import KeyValueCache
from lockstep.engine.models.families import FAMILIES
from lockstep.engine.models.families.family import Family, ModelParts
from lockstep.engine.models.families.name_rules import DECODER_RULES, NameRule
from lockstep.engine.models.families.reading import read_norm, read_size
from lockstep.engine.models.layers.context import attend_by_part
from lockstep.engine.models.layers.layer import LayerSpec
from lockstep.engine.models.layers.linear import FORMATS, LinearFormat, Part
from lockstep.engine.models.layers.mlp import GatedMLP
from lockstep.kernels.attention.attention import attention, attention_packed
from lockstep.kernels.linear.linear import linear
from lockstep.kernels.memory.kv_cache import kv_store
from lockstep.trainer_bridge.megatron.layer_spec import MODULES, Numerics


class Int8Rows(LinearFormat):
    """Each row in 8 bits with a scale of its own."""

    def parts(self, shape, dtype):
        return {"weight": Part(shape, torch.int8), "weight_scale": Part(shape[:-1], dtype)}

    def encode(self, weight):
        scale = (weight.abs().amax(-1) / 127).clamp(min=1e-12)
        return {"weight": (weight / scale[..., None]).round().to(torch.int8), "weight_scale": scale}

    def dense(self, parts):
        weight, scale = parts
        return weight.to(scale.dtype) * scale[..., None]


@dataclass(frozen=True)
class OutputGatedAttention:
    """Multi-head attention without positions, whose output has a gate: out * sigmoid(x @ gate)."""

    num_heads: int
    head_dim: int
    rope: None = None
    window: None = None
    plan_key: None = None

    @property
    def size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def heads(self) -> tuple[str, int]:
        return "num_attention_heads", self.num_heads

    @property
    def cache(self) -> KeyValueCache:
        return KeyValueCache(self.num_heads, self.head_dim)

    @property
    def pair_flops(self) -> int:
        return 4 * self.size

    def dimensions(self) -> Mapping[str, int]:
        return {"query": self.size, "key_value": self.size, "groups": self.num_heads, "qkv": 3 * self.size}

    def row_widths(self) -> Mapping[str, int]:
        return {"num_attention_heads * head_dim": self.size}

    def head_matrices(self) -> set[tuple[int, int]]:
        return set()

    def shard(self, shard):
        raise NotImplementedError

    def build(self, factory) -> nn.Module:
        return _EngineAttention(self, factory)

    def split(self, qkv: torch.Tensor) -> list[torch.Tensor]:
        """[T, 3 * size] -> q, k, v [T, heads, head_dim]."""
        return [part.contiguous() for part in qkv.view(len(qkv), self.num_heads, 3, self.head_dim).unbind(2)]


class _EngineAttention(nn.Module):
    def __init__(self, spec, factory):
        super().__init__()
        self.spec = spec
        self.linear_qkv = factory.linear(3 * spec.size, factory.hidden_size)
        self.linear_gate = factory.linear(spec.size, factory.hidden_size)
        self.linear_proj = factory.row_linear(factory.hidden_size, spec.size)

    def forward(self, hidden, positions, rope_table, cache, context):
        q, k, v = self.spec.split(self.linear_qkv.product(hidden))
        kv_store(k, v, *cache, context.slots)
        if context.rows is not None:
            q, hidden = q[context.rows], hidden[context.rows]

        def attend(rows, part):
            pages = (part.page_table, part.cu_seqlens_q, part.kv_lens)
            return attention(rows, *cache, *pages, self.spec.head_dim**-0.5)

        out = attend_by_part(q, context.parts, attend).flatten(1)
        return self.linear_proj.product(out * self.linear_gate.product(hidden).sigmoid())


@dataclass(frozen=True)
class SquaredReluMLP:
    ffn_hidden_size: int

    @property
    def token_width(self) -> int:
        return self.ffn_hidden_size

    def dimensions(self) -> Mapping[str, int]:
        return {"ffn": self.ffn_hidden_size}

    def row_widths(self) -> Mapping[str, int]:
        return {"intermediate_size": self.ffn_hidden_size}

    def shard(self, shard):
        raise NotImplementedError

    def build(self, factory) -> nn.Module:
        return _EngineMLP(self, factory)


class _EngineMLP(nn.Module):
    def __init__(self, spec, factory):
        super().__init__()
        self.linear_fc1 = factory.linear(spec.ffn_hidden_size, factory.hidden_size)
        self.linear_fc2 = factory.row_linear(factory.hidden_size, spec.ffn_hidden_size)

    def forward(self, hidden):
        return self.linear_fc2.product(self.linear_fc1.product(hidden).relu().square())


class _TrainedLinear(nn.Module):
    def __init__(self, rows, columns, format):
        super().__init__()
        self.weight, self.format = nn.Parameter(torch.empty(rows, columns)), format
        self.weight.sequence_parallel = False

    def forward(self, x):
        return linear(x, self.format.as_served(self.weight))


class _TrainedAttention(nn.Module):
    def __init__(self, config, layer_number, mixer, numerics, **unused):
        super().__init__()
        self.mixer, hidden = mixer, config.hidden_size
        self.linear_qkv = _TrainedLinear(3 * mixer.size, hidden, numerics.format)
        self.linear_gate = _TrainedLinear(mixer.size, hidden, numerics.format)
        self.linear_proj = _TrainedLinear(hidden, mixer.size, numerics.format)

    def forward(self, hidden_states, attention_mask, *, packed_seq_params, **unused):
        hidden = hidden_states.squeeze(1)
        q, k, v = self.mixer.split(self.linear_qkv(hidden))
        out = attention_packed(q, k, v, packed_seq_params.cu_seqlens_q, self.mixer.head_dim**-0.5, None).flatten(1)
        return self.linear_proj(out * self.linear_gate(hidden).sigmoid()).unsqueeze(1), None


class _TrainedMLP(nn.Module):
    def __init__(self, config, size, numerics):
        super().__init__()
        self.linear_fc1 = _TrainedLinear(size, config.hidden_size, numerics.format)
        self.linear_fc2 = _TrainedLinear(config.hidden_size, size, numerics.format)

    def forward(self, hidden, padding_mask=None):
        return self.linear_fc2(self.linear_fc1(hidden).relu().square()), None


def _megatron_attention(mixer: OutputGatedAttention, numerics: Numerics) -> type:
    init = partialmethod(_TrainedAttention.__init__, mixer=mixer, numerics=numerics)
    return type("Attention", (_TrainedAttention,), {"__init__": init})


def _megatron_mlp(mlp: SquaredReluMLP, numerics: Numerics) -> type:
    init = partialmethod(_TrainedMLP.__init__, size=mlp.ffn_hidden_size, numerics=numerics)
    return type("MLP", (_TrainedMLP,), {"__init__": init})


_HF, _MEGATRON = "model.layers.{i}.", "decoder.layers.{i}."
_RULES = (
    NameRule(
        _MEGATRON + "self_attention.linear_qkv.weight",
        tuple(f"{_HF}self_attn.{part}_proj.weight" for part in "qkv"),
        ("qkv", "hidden"),
        kind="qkv",
        part=OutputGatedAttention,
    ),
    NameRule(
        _MEGATRON + "self_attention.linear_gate.weight",
        (_HF + "self_attn.gate.weight",),
        ("query", "hidden"),
        part=OutputGatedAttention,
    ),
    NameRule(
        _MEGATRON + "self_attention.linear_proj.weight",
        (_HF + "self_attn.o_proj.weight",),
        ("hidden", "query"),
        part=OutputGatedAttention,
    ),
    NameRule(
        _MEGATRON + "mlp.linear_fc1.weight", (_HF + "mlp.up_proj.weight",), ("ffn", "hidden"), part=SquaredReluMLP
    ),
    NameRule(
        _MEGATRON + "mlp.linear_fc2.weight", (_HF + "mlp.down_proj.weight",), ("hidden", "ffn"), part=SquaredReluMLP
    ),
)


def _parse(raw: Mapping[str, Any]) -> ModelParts:
    """Every layer has this attention; the last one has a SwiGLU MLP, those before it the squared ReLU's."""
    mixer = OutputGatedAttention(read_size(raw, "num_attention_heads"), read_size(raw, "head_dim"))
    norm, ffn = read_norm(raw), read_size(raw, "intermediate_size")
    num_layers = raw["num_hidden_layers"]
    mlps = [SquaredReluMLP(ffn)] * (num_layers - 1) + [GatedMLP(ffn)]
    return ModelParts(tuple(LayerSpec(mixer, mlp, norm) for mlp in mlps), ropes={})


def add(monkeypatch) -> None:
    """The format "int8_rows" and the family "toy", until the end of the test."""
    monkeypatch.setitem(FORMATS, "int8_rows", Int8Rows())
    monkeypatch.setitem(FAMILIES, "toy", Family("toy", "ToyForCausalLM", {}, _parse, DECODER_RULES + _RULES))
    monkeypatch.setitem(MODULES, OutputGatedAttention, _megatron_attention)
    monkeypatch.setitem(MODULES, SquaredReluMLP, _megatron_mlp)
