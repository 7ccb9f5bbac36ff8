"""Attention in which groups of query heads share a key head and a value head; also multi-head and multi-query."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

from lockstep.engine.memory.layer_caches import KeyValueCache, LayerCache
from lockstep.engine.models.layers.context import AttentionContext, AttentionPart, PlanKey, attend_by_part
from lockstep.engine.models.layers.layer import ModuleFactory
from lockstep.engine.models.layers.norm import NormSpec
from lockstep.engine.models.layers.shard import Shard
from lockstep.kernels.attention.attention import attention
from lockstep.kernels.norm_rope.qk_norm_rope_store import qk_norm_rope_store


@dataclass(frozen=True)
class GroupedAttention:
    """Sizes are numbers of elements. window: the number of positions that a query sees, itself included; None: all.

    qk_norm: of each head of queries and keys, before they are turned; None for none.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: str
    window: int | None = None
    qkv_bias: bool = False
    proj_bias: bool = False
    qk_norm: NormSpec | None = None

    @property
    def has_qk_norm(self) -> bool:
        return self.qk_norm is not None

    @property
    def query_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5

    @property
    def heads(self) -> tuple[str, int]:
        return "num_key_value_heads", self.num_kv_heads

    @property
    def cache(self) -> KeyValueCache:
        return KeyValueCache(self.num_kv_heads, self.head_dim)

    @property
    def plan_key(self) -> PlanKey:
        return PlanKey(self.num_kv_heads, self.num_heads // self.num_kv_heads, self.window)

    @property
    def pair_flops(self) -> int:
        return 4 * self.query_size

    def dimensions(self) -> Mapping[str, int]:
        return {
            "head_dim": self.head_dim,
            "query": self.query_size,
            "key_value": self.kv_size,
            "groups": self.num_kv_heads,
            "qkv": self.query_size + 2 * self.kv_size,
        }

    def row_widths(self) -> Mapping[str, int]:
        return {"num_attention_heads * head_dim": self.query_size}

    def head_matrices(self) -> set[tuple[int, int]]:
        return set()

    def shard(self, shard: Shard) -> GroupedAttention:
        return replace(self, num_heads=self.num_heads // shard.size, num_kv_heads=self.num_kv_heads // shard.size)

    def build(self, factory: ModuleFactory) -> SelfAttention:
        return SelfAttention(self, factory)


class SelfAttention(nn.Module):
    def __init__(self, spec: GroupedAttention, factory: ModuleFactory) -> None:
        super().__init__()
        self.spec = spec
        hidden_size, norm = factory.hidden_size, spec.qk_norm
        self.linear_qkv = factory.linear(spec.query_size + 2 * spec.kv_size, hidden_size, spec.qkv_bias)
        self.linear_proj = factory.row_linear(hidden_size, spec.query_size, spec.proj_bias)
        self.q_layernorm = factory.norm(spec.head_dim, norm) if norm else None
        self.k_layernorm = factory.norm(spec.head_dim, norm) if norm else None
        self._linears = (self.linear_qkv, self.linear_proj)
        weights = (self.q_layernorm.weight, self.k_layernorm.weight) if norm else (None, None)
        self._norms = (*weights, norm.eps if norm else 0.0)
        self._attend = partial(_attend, scale=spec.scale, plan_key=spec.plan_key)
        self._query_size = spec.query_size

    def forward(
        self,
        hidden: torch.Tensor,
        positions: torch.Tensor,
        rope_table: torch.Tensor,
        cache: LayerCache,
        context: AttentionContext,
    ) -> torch.Tensor:
        linear_qkv, linear_proj = self._linears
        q = qk_norm_rope_store(linear_qkv.product(hidden), *self._norms, rope_table, positions, *cache, context.slots)
        if context.rows is not None:
            q = q[context.rows]
        out = attend_by_part(q, context.parts, partial(self._attend, cache=cache))
        return linear_proj.product(out.view(-1, self._query_size))


def _attend(q: torch.Tensor, part: AttentionPart, cache: LayerCache, scale: float, plan_key: PlanKey) -> torch.Tensor:
    pages = (part.page_table, part.cu_seqlens_q, part.kv_lens)
    return attention(q, *cache, *pages, scale, plan_key.window, part.plans.get(plan_key))
