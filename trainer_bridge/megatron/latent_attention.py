"""Multi-head latent attention in the trainer: Megatron-core's parameter names on the kernels that the engine calls."""

from dataclasses import dataclass

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig

from lockstep.engine.models.families.latent import MLAConfig
from lockstep.kernels.latent.latent_attention import latent_attention_packed
from lockstep.kernels.latent.latent_projection import latent_outputs, latent_queries, latent_rows
from lockstep.kernels.linear.linear import linear
from lockstep.trainer_bridge.megatron.tensor_parallel import shared_by_parts


@dataclass
class LatentSelfAttentionSubmodules:
    """column_linear: up-projections, split by head; row_linear: the output's; norm: of the projected-down rows."""

    column_linear: ModuleSpec
    row_linear: ModuleSpec
    norm: type


class WholeLinear(torch.nn.Module):
    """A linear layer that every tensor-parallel rank holds whole: the projections down."""

    def __init__(self, config: TransformerConfig, input_size: int, output_size: int):
        super().__init__()
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = torch.nn.Parameter(
            torch.empty(output_size, input_size, dtype=config.params_dtype, device=device)
        )  # fmt: skip
        # Megatron sums the gradient over tensor-parallel ranks where this is set.
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight)


class LatentSelfAttention(MegatronModule):
    """Stands in the place of Megatron's MLASelfAttention, with its parameters' names and layout.

    All heads attend to the latent, as in the engine (`kernels.latent.latent_projection`): keys and values per head,
    which Megatron makes for training, would have other bits than the engine's.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: LatentSelfAttentionSubmodules,
        layer_number: int,
        mla: MLAConfig,
        splits: int,
        pg_collection,
        **unused,
    ):
        """splits: equal parts of all heads, over which the gradient of the latent rows is summed."""
        super().__init__(config)
        self.mla, self.tp_group = mla, pg_collection.tp
        self.own_heads = config.num_attention_heads // self.tp_group.size()
        self.own_splits = splits // self.tp_group.size()
        self.sums_in_parts = splits > 1
        hidden_size, num_heads = config.hidden_size, config.num_attention_heads
        query_size = num_heads * (mla.qk_nope_head_dim + mla.qk_rope_head_dim)

        def parallel(spec: ModuleSpec, input_size: int, output_size: int, **options) -> torch.nn.Module:
            return build_module(
                spec,
                input_size,
                output_size,
                config=config,
                init_method=config.init_method,
                bias=False,
                skip_bias_add=False,
                is_expert=False,
                tp_group=self.tp_group,
                **options,
            )

        column, row, norm = submodules.column_linear, submodules.row_linear, submodules.norm
        if mla.q_lora_rank is None:
            self.linear_q_proj = parallel(column, hidden_size, query_size, gather_output=False)
        else:
            self.linear_q_down_proj = WholeLinear(config, hidden_size, mla.q_lora_rank)
            self.q_layernorm = norm(config, mla.q_lora_rank, mla.norm_eps)
            self.linear_q_up_proj = parallel(column, mla.q_lora_rank, query_size, gather_output=False)
        self.linear_kv_down_proj = WholeLinear(config, hidden_size, mla.row_width)
        self.kv_layernorm = norm(config, mla.kv_lora_rank, mla.norm_eps)
        key_value_size = num_heads * (mla.qk_nope_head_dim + mla.v_head_dim)
        self.linear_kv_up_proj = parallel(column, mla.kv_lora_rank, key_value_size, gather_output=False)
        self.linear_proj = parallel(row, num_heads * mla.v_head_dim, hidden_size, input_is_parallel=True)

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: None, *, packed_seq_params, **unused
    ) -> tuple[torch.Tensor, None]:
        """hidden_states: [T, 1, hidden]; packed_seq_params: PackedSequences. Returns the same shape, and no bias."""
        mla, packed = self.mla, packed_seq_params
        up_weight = self.linear_kv_up_proj.weight
        rope = (packed.rope_table, packed.positions, mla.rope_interleaved)
        hidden = hidden_states.squeeze(1)
        rows = latent_rows(self.linear_kv_down_proj(hidden), self.kv_layernorm.weight, mla.norm_eps, *rope)
        q = latent_queries(self._queries(hidden), up_weight, mla.qk_nope_head_dim, *rope)
        out, bias = self.linear_proj(self._outputs(q, rows, packed.cu_seqlens_q))
        return out.unsqueeze(1), bias

    def _outputs(self, q: torch.Tensor, rows: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
        """q [T, H, W] of this rank's heads, rows [T, W] -> [T, H * v_head_dim]."""
        mla = self.mla
        qs, rows_of_parts = [q], [rows]
        if self.sums_in_parts:
            qs = q.chunk(self.own_splits, dim=1)
            rows_of_parts = shared_by_parts(rows, self.own_splits, self.tp_group)
        outs = [
            latent_attention_packed(part_q, part_rows, mla.kv_lora_rank, cu_seqlens, mla.softmax_scale)
            for part_q, part_rows in zip(qs, rows_of_parts, strict=True)
        ]
        out = outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)
        return latent_outputs(out, self.linear_kv_up_proj.weight, mla.qk_nope_head_dim)

    def _queries(self, hidden: torch.Tensor) -> torch.Tensor:
        """[T, H, qk_nope_head_dim + qk_rope_head_dim], not yet rotated."""
        if self.mla.q_lora_rank is None:
            q, _ = self.linear_q_proj(hidden)
        else:
            q, _ = self.linear_q_up_proj(self.q_layernorm(self.linear_q_down_proj(hidden)))
        return q.unflatten(-1, (self.own_heads, -1))
