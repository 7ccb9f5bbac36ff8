"""The decoder that the engine runs: lockstep's kernels over weights with Megatron-core's names and layout."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import nn

from lockstep.engine.models.config import ModelConfig
from lockstep.engine.models.moe import routed_experts
from lockstep.engine.models.sharding import WHOLE, Shard, part_of, shard_config
from lockstep.engine.ranks.rank_group import RankGroup
from lockstep.kernels.attention.attention import attention
from lockstep.kernels.attention.attention_plan import AttentionPlan
from lockstep.kernels.latent.latent_attention import latent_attention
from lockstep.kernels.latent.latent_cache import latent_store, new_latent_cache
from lockstep.kernels.latent.latent_projection import latent_outputs, latent_queries, latent_rows
from lockstep.kernels.linear.linear import linear
from lockstep.kernels.linear.linear_silu_mul import linear_silu_mul
from lockstep.kernels.linear.row_parallel_linear import row_parallel_linear
from lockstep.kernels.linear.scalar_head import scalar_head
from lockstep.kernels.memory.embedding import embedding
from lockstep.kernels.memory.kv_cache import new_kv_cache
from lockstep.kernels.moe.moe_experts import JoinRows
from lockstep.kernels.norm_rope.qk_norm_rope_store import qk_norm_rope_store
from lockstep.kernels.norm_rope.rms_norm import add_rms_norm, rms_norm
from lockstep.kernels.norm_rope.rope import rope_cos_sin, rope_inv_freq

# linear_proj and linear_fc2, whose sum runs over what the ranks split: (x, weight, bias) -> y.
RowLinear = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]

# A layer's (k_cache, v_cache) of `kernels.kv_cache`, or the one cache of `kernels.latent_cache`.
LayerCache = tuple[torch.Tensor, ...]


def new_layer_caches(
    config: ModelConfig, num_pages: int, page_size: int, dtype: torch.dtype, device: torch.device | str
) -> list[LayerCache]:
    """The uninitialised caches of all layers."""
    if config.mla is not None:
        width = config.mla.row_width
        return [(new_latent_cache(num_pages, page_size, width, dtype, device),) for _ in range(config.num_layers)]
    sizes = (num_pages, page_size, config.num_kv_heads, config.head_dim)
    return [new_kv_cache(*sizes, dtype, device) for _ in range(config.num_layers)]


@dataclass(frozen=True)
class AttentionPart:
    """Requests whose queries are `num_rows` consecutive rows of a step. B requests, MP pages at most per request.

    page_table:   int32 [B, MP], the pages of each request in order.
    cu_seqlens_q: int32 [B + 1], the rows of request b are cu_seqlens_q[b] to cu_seqlens_q[b + 1] of the part's.
    kv_lens:      int32 [B], tokens of request b in the cache once this step's are stored.
    plans:        per attention window of the model, how to cut the work (decode on a GPU); missing: not planned.
    max_queries:  the most rows of a request, where they are few; None: any number.
    """

    num_rows: int
    page_table: torch.Tensor
    cu_seqlens_q: torch.Tensor
    kv_lens: torch.Tensor
    plans: dict[int | None, AttentionPlan] = field(default_factory=dict)
    max_queries: int | None = None


@dataclass(frozen=True)
class AttentionContext:
    """Where a step's T rows find and leave their keys and values.

    kv_caches: one per layer, from `new_layer_caches`.
    slots:     int64 [T], where each row's key and value go; -1 for padding rows.
    parts:     the requests of the rows that attend; the parts' rows follow one another and are all of them.
    rows:      int64 [R], the rows that attend and go on; the others end with their key and value. None: all.
    """

    kv_caches: list[LayerCache]
    slots: torch.Tensor
    parts: tuple[AttentionPart, ...]
    rows: torch.Tensor | None = None


class _Weights(nn.Module):
    """A named place for a weight and perhaps a bias; the arithmetic is in the kernels.

    The modules that use a weight also hold its tensor in a tuple: a look-up of `module.weight` takes nn.Module a
    microsecond, and a decode step does a dozen per layer.
    """

    def __init__(self, *shape: int, bias: bool = False, **factory: torch.device | torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape, **factory), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(shape[0], **factory), requires_grad=False) if bias else None


class _SelfAttention(nn.Module):
    def __init__(
        self, config: ModelConfig, window: int | None, row_linear: RowLinear, **factory: torch.device | torch.dtype
    ) -> None:
        super().__init__()
        self.row_linear = row_linear
        self.eps = config.rms_norm_eps
        self.scale = config.head_dim**-0.5
        self.window = window
        self.query_size = config.num_heads * config.head_dim
        qkv_size = self.query_size + 2 * config.num_kv_heads * config.head_dim
        self.linear_qkv = _Weights(qkv_size, config.hidden_size, bias=config.qkv_bias, **factory)
        self.linear_proj = _Weights(config.hidden_size, self.query_size, bias=config.proj_bias, **factory)
        self.q_layernorm = _Weights(config.head_dim, **factory) if config.qk_norm else None
        self.k_layernorm = _Weights(config.head_dim, **factory) if config.qk_norm else None
        self._linear_tensors = (
            self.linear_qkv.weight,
            self.linear_qkv.bias,
            self.linear_proj.weight,
            self.linear_proj.bias,
        )
        self._norm_weights = (self.q_layernorm.weight, self.k_layernorm.weight) if config.qk_norm else (None, None)

    def forward(
        self,
        hidden: torch.Tensor,
        positions: torch.Tensor,
        cos_sin: torch.Tensor,
        kv_cache: LayerCache,
        context: AttentionContext,
    ) -> torch.Tensor:
        qkv_weight, qkv_bias, proj_weight, proj_bias = self._linear_tensors
        k_cache, v_cache = kv_cache
        q = qk_norm_rope_store(
            linear(hidden, qkv_weight, qkv_bias), *self._norm_weights, self.eps,
            cos_sin, positions, k_cache, v_cache, context.slots,
        )  # fmt: skip
        if context.rows is not None:
            q = q[context.rows]
        outs = [
            attention(
                part_q,
                k_cache,
                v_cache,
                part.page_table,
                part.cu_seqlens_q,
                part.kv_lens,
                self.scale,
                self.window,
                part.plans.get(self.window),
            )
            for part_q, part in zip(q.split([part.num_rows for part in context.parts]), context.parts, strict=True)
        ]
        out = outs[0] if len(outs) == 1 else torch.cat(outs)
        return self.row_linear(out.view(-1, self.query_size), proj_weight, proj_bias)


class _LatentSelfAttention(nn.Module):
    """Multi-head latent attention. The cache holds a token's latent and rotated key, once for all heads."""

    def __init__(self, config: ModelConfig, row_linear: RowLinear, **factory: torch.device | torch.dtype) -> None:
        super().__init__()
        self.row_linear = row_linear
        self.mla = mla = config.mla
        self.num_heads = config.num_heads
        query_size = config.num_heads * (mla.qk_nope_head_dim + mla.qk_rope_head_dim)
        key_value_size = config.num_heads * (mla.qk_nope_head_dim + mla.v_head_dim)
        if mla.q_lora_rank is None:
            self.linear_q_proj = _Weights(query_size, config.hidden_size, **factory)
        else:
            self.linear_q_down_proj = _Weights(mla.q_lora_rank, config.hidden_size, **factory)
            self.q_layernorm = _Weights(mla.q_lora_rank, **factory)
            self.linear_q_up_proj = _Weights(query_size, mla.q_lora_rank, **factory)
        self.linear_kv_down_proj = _Weights(mla.row_width, config.hidden_size, **factory)
        self.kv_layernorm = _Weights(mla.kv_lora_rank, **factory)
        self.linear_kv_up_proj = _Weights(key_value_size, mla.kv_lora_rank, **factory)
        self.linear_proj = _Weights(config.hidden_size, config.num_heads * mla.v_head_dim, **factory)

    def _queries(self, hidden: torch.Tensor) -> torch.Tensor:
        if self.mla.q_lora_rank is None:
            q = linear(hidden, self.linear_q_proj.weight)
        else:
            q_low = rms_norm(linear(hidden, self.linear_q_down_proj.weight), self.q_layernorm.weight, self.mla.norm_eps)
            q = linear(q_low, self.linear_q_up_proj.weight)
        return q.unflatten(-1, (self.num_heads, -1))

    def forward(
        self,
        hidden: torch.Tensor,
        positions: torch.Tensor,
        cos_sin: torch.Tensor,
        kv_cache: LayerCache,
        context: AttentionContext,
    ) -> torch.Tensor:
        mla, up_weight = self.mla, self.linear_kv_up_proj.weight
        (cache,) = kv_cache
        rows = latent_rows(
            linear(hidden, self.linear_kv_down_proj.weight), self.kv_layernorm.weight, mla.norm_eps,
            cos_sin, positions, mla.rope_interleaved,
        )  # fmt: skip
        latent_store(rows, cache, context.slots)
        if context.rows is not None:
            hidden, positions = hidden[context.rows], positions[context.rows]
        q = latent_queries(
            self._queries(hidden), up_weight, mla.qk_nope_head_dim, cos_sin, positions, mla.rope_interleaved
        )
        outs = [
            latent_attention(
                part_q, cache, mla.kv_lora_rank, part.page_table, part.cu_seqlens_q, part.kv_lens, mla.softmax_scale
            )
            for part_q, part in zip(q.split([part.num_rows for part in context.parts]), context.parts, strict=True)
        ]
        out = outs[0] if len(outs) == 1 else torch.cat(outs)
        return self.row_linear(latent_outputs(out, up_weight, mla.qk_nope_head_dim), self.linear_proj.weight, None)


class _MLP(nn.Module):
    def __init__(self, config: ModelConfig, row_linear: RowLinear, **factory: torch.device | torch.dtype) -> None:
        super().__init__()
        self.row_linear = row_linear
        self.linear_fc1 = _Weights(2 * config.ffn_hidden_size, config.hidden_size, bias=config.mlp_bias, **factory)
        self.linear_fc2 = _Weights(config.hidden_size, config.ffn_hidden_size, bias=config.mlp_bias, **factory)
        self._tensors = (self.linear_fc1.weight, self.linear_fc1.bias, self.linear_fc2.weight, self.linear_fc2.bias)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        fc1_weight, fc1_bias, fc2_weight, fc2_bias = self._tensors
        return self.row_linear(linear_silu_mul(hidden, fc1_weight, fc1_bias), fc2_weight, fc2_bias)


class _Router(_Weights):
    def __init__(self, config: ModelConfig, **factory: torch.device | torch.dtype) -> None:
        super().__init__(config.moe.num_experts, config.hidden_size, **factory)
        bias = torch.empty(config.moe.num_experts, dtype=torch.float32, device=factory["device"])
        self.expert_bias = nn.Parameter(bias, requires_grad=False) if config.moe.has_expert_bias else None


class _Experts(nn.Module):
    """The experts of a layer that this rank holds, in two tensors."""

    def __init__(self, config: ModelConfig, **factory: torch.device | torch.dtype) -> None:
        super().__init__()
        num_experts, ffn = len(config.moe.held), config.moe.ffn_hidden_size
        self.linear_fc1 = _Weights(num_experts, 2 * ffn, config.hidden_size, **factory)
        self.linear_fc2 = _Weights(num_experts, config.hidden_size, ffn, **factory)


class _MoE(nn.Module):
    """A token's experts, weighted, plus the shared experts' output where there are any.

    join_rows: see `moe_experts`; None for a rank that holds all experts.
    """

    def __init__(
        self,
        config: ModelConfig,
        row_linear: RowLinear,
        join_rows: JoinRows | None = None,
        **factory: torch.device | torch.dtype,
    ) -> None:
        super().__init__()
        self.config = config.moe
        self.join_rows = join_rows
        self.router = _Router(config, **factory)
        self.experts = _Experts(config, **factory)
        self.shared_experts = None
        if config.moe.has_shared_experts:
            shared = replace(config, ffn_hidden_size=config.moe.shared_ffn_hidden_size, mlp_bias=False)
            self.shared_experts = _MLP(shared, row_linear, **factory)
        self._tensors = (
            self.router.weight,
            self.router.expert_bias,
            self.experts.linear_fc1.weight,
            self.experts.linear_fc2.weight,
        )

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        routed = routed_experts(hidden, self.config, *self._tensors, self.join_rows)
        return routed if self.shared_experts is None else routed + self.shared_experts(hidden)


class _Layer(nn.Module):
    def __init__(
        self,
        config: ModelConfig,
        window: int | None,
        has_experts: bool,
        row_linear: RowLinear,
        join_rows: JoinRows | None,
        **factory: torch.device | torch.dtype,
    ) -> None:
        super().__init__()
        self.eps = config.rms_norm_eps
        self.input_layernorm = _Weights(config.hidden_size, **factory)
        if config.mla is None:
            self.self_attention = _SelfAttention(config, window, row_linear, **factory)
        else:
            self.self_attention = _LatentSelfAttention(config, row_linear, **factory)
        self.pre_mlp_layernorm = _Weights(config.hidden_size, **factory)
        self.mlp = (
            _MoE(config, row_linear, join_rows, **factory) if has_experts else _MLP(config, row_linear, **factory)
        )
        self._norm_weights = (self.input_layernorm.weight, self.pre_mlp_layernorm.weight)

    def forward(
        self,
        hidden: torch.Tensor,
        residual: torch.Tensor | None,
        positions: torch.Tensor,
        cos_sin: torch.Tensor,
        kv_cache: LayerCache,
        context: AttentionContext,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """hidden: the previous layer's MLP output, not yet added to `residual` (None before the first layer)."""
        input_norm_weight, pre_mlp_norm_weight = self._norm_weights
        if residual is None:
            residual = hidden
            hidden = rms_norm(hidden, input_norm_weight, self.eps)
        else:
            hidden, residual = add_rms_norm(hidden, residual, input_norm_weight, self.eps)
        hidden = self.self_attention(hidden, positions, cos_sin, kv_cache, context)
        if context.rows is not None:
            residual = residual[context.rows]
        hidden, residual = add_rms_norm(hidden, residual, pre_mlp_norm_weight, self.eps)
        return self.mlp(hidden), residual


class _Embedding(nn.Module):
    def __init__(self, config: ModelConfig, **factory: torch.device | torch.dtype) -> None:
        super().__init__()
        self.word_embeddings = _Weights(config.vocab_size, config.hidden_size, **factory)


class _Layers(nn.Module):
    def __init__(
        self,
        config: ModelConfig,
        row_linear: RowLinear,
        join_rows: JoinRows | None,
        **factory: torch.device | torch.dtype,
    ) -> None:
        super().__init__()
        layers_with_experts = config.moe.layers if config.moe is not None else ()
        self.layers = nn.ModuleList(
            _Layer(config, window, layer in layers_with_experts, row_linear, join_rows, **factory)
            for layer, window in enumerate(config.layer_windows)
        )
        self.final_layernorm = _Weights(config.hidden_size, **factory)


class Decoder(nn.Module):
    """Token ids and positions in, hidden states and logits out, with keys and values in a paged cache.

    Parameters are uninitialised (see `engine.checkpoint`), take no gradient, and stay where they are for the life of
    the module: new weights are copied into them. Their names are those of `names.expand(config)`. The bits of an output
    row depend on that row's request alone.

    config is the whole model's. Where it runs on several ranks, this one holds its part (`sharding.parameter_shards`),
    of the sizes `local_config`, and every rank calls the same methods with the same arguments.
    row_parallel_splits: see `kernels.row_parallel_linear`; in all, over the ranks, which divide it.
    share_experts: the ranks share out the experts of a layer, whole; else each holds all of them.
    """

    def __init__(
        self,
        config: ModelConfig,
        device: str | torch.device,
        dtype: torch.dtype,
        row_parallel_splits: int = 1,
        ranks: RankGroup | None = None,
        share_experts: bool = False,
    ) -> None:
        super().__init__()
        self.config = config
        self.ranks = ranks
        self.shard = WHOLE if ranks is None else Shard(ranks.rank, ranks.size, ranks.size if share_experts else 1)
        self.local_config = shard_config(config, self.shard)
        factory = {"device": torch.device(device), "dtype": dtype}
        self.embedding = _Embedding(self.local_config, **factory)
        join_rows = ranks.sum_disjoint if self.shard.expert_ranks > 1 else None
        self.decoder = _Layers(self.local_config, _row_linear(row_parallel_splits, ranks), join_rows, **factory)
        output_rows = 1 if config.head == "scalar" else self.local_config.vocab_size
        self.output_layer = None if config.tie_word_embeddings else _Weights(output_rows, config.hidden_size, **factory)
        inv_freq, attention_factor = rope_inv_freq(
            config.head_dim, config.rope_theta, config.rope_scaling, config.max_position_embeddings
        )
        cos_sin = rope_cos_sin(inv_freq, attention_factor, config.max_position_embeddings)
        self.register_buffer("rope_cos_sin", cos_sin.to(device), persistent=False)

    def forward(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        context: AttentionContext,
        last_context: AttentionContext | None = None,
    ) -> torch.Tensor:
        """Hidden states [T, H] after the final norm; the rows' keys and values go to the cache.

        token_ids, positions: int64 [T]. last_context: the last layer's, if not all hidden states are wanted; those of
        its `rows` are returned.
        """
        return self.forward_with_aux(token_ids, positions, context, (), last_context)[0]

    def forward_with_aux(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        context: AttentionContext,
        aux_layers: tuple[int, ...],
        last_context: AttentionContext | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(what `forward` gives, to the bit; aux [T, A * H], the hidden states of all rows that enter A layers).

        aux_layers: ascending, from 0; num_layers is the final norm, which is entered by the rows of the last layer
        alone, so no last_context goes with it. The states lie side by side in that order.
        """
        hidden = self._embed(token_ids)
        residual = None
        cos_sin = self.rope_cos_sin
        aux = hidden.new_empty(len(hidden), len(aux_layers), self.config.hidden_size)
        last = self.config.num_layers - 1
        for number, (layer, kv_cache) in enumerate(zip(self.decoder.layers, context.kv_caches, strict=True)):
            if number in aux_layers:
                entering = aux[:, aux_layers.index(number)]
                entering.copy_(hidden) if residual is None else torch.add(hidden, residual, out=entering)
            own_context = (last_context or context) if number == last else context
            hidden, residual = layer(hidden, residual, positions, cos_sin, kv_cache, own_context)
        hidden, summed = add_rms_norm(hidden, residual, self.decoder.final_layernorm.weight, self.config.rms_norm_eps)
        if self.config.num_layers in aux_layers:
            assert last_context is None, "the states that enter the final norm are wanted of all rows"
            aux[:, -1] = summed
        return hidden, aux.flatten(1)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor | None:
        """Logits [N, V] of the hidden states [N, H] of `forward`, in the model's dtype. None on ranks other than 0.

        Of a model with a scalar head its values fp32 [N, 1], on every rank.
        """
        if self.config.head == "scalar":
            return scalar_head(hidden, self.output_layer.weight)
        logits = linear(hidden, self.head_weight, None)
        return logits if self.ranks is None else self.ranks.gather_columns(logits, self.config.vocab_size)

    @property
    def head_weight(self) -> torch.Tensor:
        """[V, H] (of a rank: its part), tied to the embedding or not."""
        head = self.embedding.word_embeddings if self.output_layer is None else self.output_layer
        return head.weight

    def _embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        weight = self.embedding.word_embeddings.weight
        if self.ranks is None:
            return embedding(token_ids, weight)
        row = token_ids - part_of(self.config.vocab_size, self.shard).start
        is_elsewhere = (row < 0) | (row >= len(weight))
        hidden = embedding(row.masked_fill(is_elsewhere, 0), weight).masked_fill_(is_elsewhere[:, None], 0)
        return self.ranks.sum_disjoint(hidden)


def _row_linear(splits: int, ranks: RankGroup | None) -> RowLinear:
    if ranks is not None:
        return partial(row_parallel_linear, splits=splits // ranks.size, sum_over_ranks=ranks.sum)
    return linear if splits == 1 else partial(row_parallel_linear, splits=splits)
