"""Multi-head latent attention, which keeps one row per token for all heads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

from lockstep.engine.memory.layer_caches import LatentCache, LayerCache
from lockstep.engine.models.layers.context import AttentionContext, AttentionPart, attend_by_part
from lockstep.engine.models.layers.layer import ModuleFactory
from lockstep.engine.models.layers.norm import NormSpec
from lockstep.engine.models.layers.shard import Shard
from lockstep.kernels.latent.latent_attention import latent_attention
from lockstep.kernels.latent.latent_projection import latent_outputs, latent_queries, latent_rows
from lockstep.kernels.memory.latent_cache import latent_store


@dataclass(frozen=True)
class LatentAttention:
    """Sizes are numbers of elements.

    q_lora_rank:      the width that queries are projected down to and up from again; None: they are projected at once.
    kv_lora_rank:     the latent's width, of which every head makes its keys and values.
    qk_nope_head_dim: a head's query and key elements that are not rotated.
    qk_rope_head_dim: those that are; the key's are the same for all heads.
    v_head_dim:       a head's value elements.
    rope_interleaved: rotated elements lie in pairs, not in halves.
    softmax_scale:    of the scores.
    norm:             of the projected-down queries and of the latent.
    """

    num_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    rope: str
    rope_interleaved: bool
    softmax_scale: float
    norm: NormSpec
    window: None = None

    @property
    def has_q_lora(self) -> bool:
        return self.q_lora_rank is not None

    @property
    def row_width(self) -> int:
        """Elements that the cache holds per token: the latent, and the key's rotated part."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def query_size(self) -> int:
        return self.num_heads * (self.qk_nope_head_dim + self.qk_rope_head_dim)

    @property
    def key_value_size(self) -> int:
        return self.num_heads * (self.qk_nope_head_dim + self.v_head_dim)

    @property
    def out_size(self) -> int:
        return self.num_heads * self.v_head_dim

    @property
    def heads(self) -> tuple[str, int]:
        return "num_attention_heads", self.num_heads

    @property
    def cache(self) -> LatentCache:
        return LatentCache(self.row_width)

    @property
    def plan_key(self) -> None:
        return None  # one kernel for prefill and decode, which goes without plans

    @property
    def pair_flops(self) -> int:
        return 2 * (self.query_size + self.out_size)

    def dimensions(self) -> Mapping[str, int]:
        return {
            "q_lora": self.q_lora_rank or 0,
            "kv_lora": self.kv_lora_rank,
            "mla_query": self.query_size,
            "mla_row": self.row_width,
            "mla_key_value": self.key_value_size,
            "mla_out": self.out_size,
        }

    def row_widths(self) -> Mapping[str, int]:
        return {"num_attention_heads * v_head_dim": self.out_size}

    def head_matrices(self) -> set[tuple[int, int]]:
        return {(self.kv_lora_rank, self.qk_nope_head_dim), (self.v_head_dim, self.kv_lora_rank)}

    def shard(self, shard: Shard) -> LatentAttention:
        """Some of the heads, and the latent whole."""
        return replace(self, num_heads=self.num_heads // shard.size)

    def build(self, factory: ModuleFactory) -> LatentSelfAttention:
        return LatentSelfAttention(self, factory)


class LatentSelfAttention(nn.Module):
    def __init__(self, spec: LatentAttention, factory: ModuleFactory) -> None:
        super().__init__()
        self.spec = spec
        hidden_size = factory.hidden_size
        if spec.q_lora_rank is None:
            self.linear_q_proj = factory.linear(spec.query_size, hidden_size)
        else:
            self.linear_q_down_proj = factory.linear(spec.q_lora_rank, hidden_size)
            self.q_layernorm = factory.norm(spec.q_lora_rank, spec.norm)
            self.linear_q_up_proj = factory.linear(spec.query_size, spec.q_lora_rank)
        self.linear_kv_down_proj = factory.linear(spec.row_width, hidden_size)
        self.kv_layernorm = factory.norm(spec.kv_lora_rank, spec.norm)
        self.linear_kv_up_proj = factory.linear(spec.key_value_size, spec.kv_lora_rank)
        self.linear_proj = factory.row_linear(hidden_size, spec.out_size)

    def forward(
        self,
        hidden: torch.Tensor,
        positions: torch.Tensor,
        rope_table: torch.Tensor,
        cache: LayerCache,
        context: AttentionContext,
    ) -> torch.Tensor:
        spec, up_weight = self.spec, self.linear_kv_up_proj.dense()
        latents, norm = self.linear_kv_down_proj.product(hidden), self.kv_layernorm
        rows = latent_rows(latents, norm.weight, norm.eps, rope_table, positions, spec.rope_interleaved)
        latent_store(rows, *cache, context.slots)
        if context.rows is not None:
            hidden, positions = hidden[context.rows], positions[context.rows]
        q = latent_queries(
            self._queries(hidden), up_weight, spec.qk_nope_head_dim, rope_table, positions, spec.rope_interleaved
        )
        out = attend_by_part(q, context.parts, partial(self._attend, cache=cache))
        return self.linear_proj.product(latent_outputs(out, up_weight, spec.qk_nope_head_dim))

    def _attend(self, q: torch.Tensor, part: AttentionPart, cache: LayerCache) -> torch.Tensor:
        pages = (part.page_table, part.cu_seqlens_q, part.kv_lens)
        return latent_attention(q, *cache, self.spec.kv_lora_rank, *pages, self.spec.softmax_scale)

    def _queries(self, hidden: torch.Tensor) -> torch.Tensor:
        if self.spec.q_lora_rank is None:
            q = self.linear_q_proj.product(hidden)
        else:
            q = self.linear_q_up_proj.product(self.q_layernorm.normed(self.linear_q_down_proj.product(hidden)))
        return q.unflatten(-1, (self.spec.num_heads, -1))
