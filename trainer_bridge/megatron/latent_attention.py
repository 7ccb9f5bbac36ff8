"""Multi-head latent attention in the trainer: Megatron-core's parameter names on the kernels that the engine calls."""

from dataclasses import dataclass

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig

from lockstep.engine.models.layers.latent_attention import LatentAttention
from lockstep.engine.models.layers.linear import LinearFormat
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

    def __init__(self, config: TransformerConfig, input_size: int, output_size: int, format: LinearFormat):
        super().__init__()
        self.format = format
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = torch.nn.Parameter(
            torch.empty(output_size, input_size, dtype=config.params_dtype, device=device)
        )  # fmt: skip
        # Megatron sums the gradient over tensor-parallel ranks where this is set.
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.format.as_served(self.weight))


class MegatronLatentAttention(MegatronModule):
    """Stands in the place of Megatron's MLASelfAttention, with its parameters' names and layout.

    All heads attend to the latent, as in the engine (`kernels.latent.latent_projection`): keys and values per head,
    which Megatron makes for training, would have other bits than the engine's.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: LatentSelfAttentionSubmodules,
        layer_number: int,
        mixer: LatentAttention,
        format: LinearFormat,
        splits: int,
        pg_collection,
        **unused,
    ):
        """splits: equal parts of all heads, over which the gradient of the latent rows is summed."""
        super().__init__(config)
        self.mixer, self.tp_group = mixer, pg_collection.tp
        self.own_heads = mixer.num_heads // self.tp_group.size()
        self.own_splits = splits // self.tp_group.size()
        self.sums_in_parts = splits > 1
        hidden_size, query_size = config.hidden_size, mixer.query_size

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
        if mixer.q_lora_rank is None:
            self.linear_q_proj = parallel(column, hidden_size, query_size, gather_output=False)
        else:
            self.linear_q_down_proj = WholeLinear(config, hidden_size, mixer.q_lora_rank, format)
            self.q_layernorm = norm(config, mixer.q_lora_rank, mixer.norm.eps)
            self.linear_q_up_proj = parallel(column, mixer.q_lora_rank, query_size, gather_output=False)
        self.linear_kv_down_proj = WholeLinear(config, hidden_size, mixer.row_width, format)
        self.kv_layernorm = norm(config, mixer.kv_lora_rank, mixer.norm.eps)
        self.linear_kv_up_proj = parallel(column, mixer.kv_lora_rank, mixer.key_value_size, gather_output=False)
        self.linear_proj = parallel(row, mixer.out_size, hidden_size, input_is_parallel=True)

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: None, *, packed_seq_params, **unused
    ) -> tuple[torch.Tensor, None]:
        """hidden_states: [T, 1, hidden]; packed_seq_params: PackedSequences. Returns the same shape, and no bias."""
        mixer, packed = self.mixer, packed_seq_params
        up_weight = self.linear_kv_up_proj.served_weight()
        rope = (packed.rope_tables[mixer.rope], packed.positions, mixer.rope_interleaved)
        hidden = hidden_states.squeeze(1)
        rows = latent_rows(self.linear_kv_down_proj(hidden), self.kv_layernorm.weight, mixer.norm.eps, *rope)
        q = latent_queries(self._queries(hidden), up_weight, mixer.qk_nope_head_dim, *rope)
        attended = latent_outputs(self._attend(q, rows, packed.cu_seqlens_q), up_weight, mixer.qk_nope_head_dim)
        out, bias = self.linear_proj(attended)
        return out.unsqueeze(1), bias

    def _attend(self, q: torch.Tensor, rows: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
        """q [T, H, W] of this rank's heads, rows [T, W] -> [T, H, kv_lora_rank]."""
        mixer = self.mixer
        qs, rows_of_parts = [q], [rows]
        if self.sums_in_parts:
            qs = q.chunk(self.own_splits, dim=1)
            rows_of_parts = shared_by_parts(rows, self.own_splits, self.tp_group)
        outs = [
            latent_attention_packed(part_q, part_rows, mixer.kv_lora_rank, cu_seqlens, mixer.softmax_scale)
            for part_q, part_rows in zip(qs, rows_of_parts, strict=True)
        ]
        return outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)

    def _queries(self, hidden: torch.Tensor) -> torch.Tensor:
        """[T, H, qk_nope_head_dim + qk_rope_head_dim], not yet rotated."""
        if self.mixer.q_lora_rank is None:
            q, _ = self.linear_q_proj(hidden)
        else:
            q, _ = self.linear_q_up_proj(self.q_layernorm(self.linear_q_down_proj(hidden)))
        return q.unflatten(-1, (self.own_heads, -1))
