"""The modules that put lockstep.kernels into Megatron-core's transformer layer, and the spec that names them.

Megatron-core keeps what is its own: parameter names and layout, sharded state, residual adds, the order of calls.
Each module here holds no arithmetic: it calls the kernel that the engine calls, so the bits are the engine's.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, partialmethod

import torch
from megatron.core import parallel_state
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch.utils.checkpoint import checkpoint

from lockstep.engine.models.config import ModelConfig
from lockstep.kernels.attention.attention import attention_packed
from lockstep.kernels.linear.row_parallel_linear import row_parallel_linear
from lockstep.kernels.linear.silu_mul_linear import silu_mul_linear
from lockstep.kernels.norm_rope.rms_norm import rms_norm
from lockstep.kernels.norm_rope.rope import apply_rope
from lockstep.trainer_bridge.config import ParallelSizes
from lockstep.trainer_bridge.megatron.latent_attention import LatentSelfAttention, LatentSelfAttentionSubmodules
from lockstep.trainer_bridge.megatron.moe_layer import KernelMoE
from lockstep.trainer_bridge.megatron.tensor_parallel import (
    column_parallel_linear,
    shared_by_parts,
    sum_partial_outputs,
)


@dataclass
class PackedSequences(PackedSeqParams):
    """Megatron's description of packed ("thd") sequences, with what our rotary embedding reads.

    positions: int64 [T], each token's position in its own sequence.
    rope_table: fp32 [P, D] of lockstep.kernels.norm_rope.rope.rope_cos_sin.
    """

    positions: torch.Tensor | None = None
    rope_table: torch.Tensor | None = None

    @classmethod
    def of(cls, positions: torch.Tensor, cu_seqlens: torch.Tensor, rope_table: torch.Tensor) -> "PackedSequences":
        """cu_seqlens: int32 [B+1], the offsets of the sequences in the pack."""
        return cls(
            qkv_format="thd",
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens,
            positions=positions,
            rope_table=rope_table,
        )


class KernelRMSNorm(torch.nn.Module):
    """RMSNorm over the last dimension: of the hidden size, or of one head for the q and k norms."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float):
        super().__init__()
        self.eps = eps
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device))
        # Megatron sums the gradient over tensor-parallel ranks where this is set.
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # A key is a part of the fused projection, all of which would live until the backward pass if a view were saved.
        return rms_norm(x.contiguous(), self.weight, self.eps)


class KernelHeadRMSNorm(KernelRMSNorm):
    """RMSNorm of each head [..., heads, D], whose weight's gradient is summed over `splits` equal parts of all heads.

    A rank holds splits / ranks of the parts.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, splits: int):
        super().__init__(config, hidden_size, eps)
        self.splits = splits
        self.group = parallel_state.get_tensor_model_parallel_group()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.splits == 1:
            return super().forward(x)
        num_parts = self.splits // self.group.size()
        weights = shared_by_parts(self.weight, num_parts, self.group)
        parts = x.chunk(num_parts, dim=-2)
        normed = [rms_norm(part.contiguous(), w, self.eps) for part, w in zip(parts, weights, strict=True)]
        return torch.cat(normed, dim=-2)


class KernelColumnLinear(ColumnParallelLinear):
    """Column-parallel linear whose product and bias are one call of the linear kernel.

    has_bias replaces Megatron's one switch for the biases of all linear layers. splits: parts in which the input's
    gradient is summed over the output's columns of all ranks. num_blocks: matrices that make up the weight of a rank.
    """

    def __init__(self, *args, has_bias: bool, splits: int, num_blocks: int = 1, **kwargs):
        super().__init__(*args, **{**kwargs, "bias": has_bias, "skip_bias_add": False})
        self.splits, self.num_blocks = splits, num_blocks

    def forward(self, input_: torch.Tensor) -> tuple[torch.Tensor, None]:
        num_parts, in_parts = self.splits // self.tp_group.size(), self.splits > 1
        return column_parallel_linear(
            input_, self.weight, self.bias, self.tp_group, num_parts, self.num_blocks, in_parts
        ), None


class KernelRowLinear(RowParallelLinear):
    """Row-parallel linear, as in the engine. splits: parts of the sum over the inner dimension of all ranks."""

    def __init__(self, *args, has_bias: bool, splits: int, **kwargs):
        super().__init__(*args, **{**kwargs, "bias": has_bias, "skip_bias_add": False})
        self.own_splits = splits // self.tp_group.size()

    def forward(self, input_: torch.Tensor) -> tuple[torch.Tensor, None]:
        return row_parallel_linear(input_, self.weight, self.bias, self.own_splits, self._sum_over_ranks()), None

    def _sum_over_ranks(self) -> Callable[[torch.Tensor], torch.Tensor] | None:
        return None if self.tp_group.size() == 1 else partial(sum_partial_outputs, group=self.tp_group)


class NoActivation(MegatronModule):
    """Stands where Megatron's MLP calls its activation on the whole of linear_fc1's output: linear_fc2 does it."""

    def __init__(self, config: TransformerConfig):
        super().__init__(config)

    def forward(self, gate_up: torch.Tensor) -> torch.Tensor:
        return gate_up


class KernelSiluMulRowLinear(KernelRowLinear):
    """The MLP's second linear layer with the activation before it, [..., 2F] (gate | up) -> [..., H]."""

    def forward(self, input_: torch.Tensor) -> tuple[torch.Tensor, None]:
        sum_over_ranks = self._sum_over_ranks()
        if sum_over_ranks is None:
            return silu_mul_linear(input_, self.weight, self.bias, self.own_splits), None
        out = sum_over_ranks(silu_mul_linear(input_, self.weight, None, self.own_splits))
        return out if self.bias is None else out + self.bias, None


class KernelCoreAttention(torch.nn.Module):
    """Rotary embedding and packed causal attention; a layer's sliding window is chosen by its number (from 1)."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        layer_windows: tuple[int | None, ...],
        softmax_scale: float | None,
        **unused,
    ):
        super().__init__()
        self.scale = config.kv_channels**-0.5 if softmax_scale is None else softmax_scale
        self.window = layer_windows[layer_number - 1]

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: None,
        *,
        packed_seq_params: PackedSequences,
        **unused,
    ) -> torch.Tensor:
        """query [T, N, D], key and value [T, NKV, D] -> [T, N * D]."""
        table, positions = packed_seq_params.rope_table, packed_seq_params.positions
        query = apply_rope(query, table, positions)
        key = apply_rope(key, table, positions)
        cu_seqlens = packed_seq_params.cu_seqlens_q
        out = attention_packed(query, key, value.contiguous(), cu_seqlens, self.scale, self.window)
        return out.flatten(1)


class RecomputedLayer(TransformerLayer):
    """A transformer layer that keeps only its input for the backward pass.

    Megatron's own recomputation saves and restores CUDA's random state, which nothing here draws from.
    """

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> tuple[torch.Tensor, None]:
        return checkpoint(super().forward, hidden_states, use_reentrant=False, preserve_rng_state=False, **kwargs)


def block_spec(
    model: ModelConfig, recompute: bool, sizes: ParallelSizes, stage_layers: range
) -> TransformerBlockSubmodules:
    """The spec of the layers of one pipeline stage, by their numbers from 0, and of the final norm, which the last has.

    recompute: trade the activations inside a layer for a second forward pass.
    """
    row_parallel_splits = sizes.row_parallel_splits
    attention = _attention_spec(model, row_parallel_splits)
    dense = ModuleSpec(
        module=MLP,
        params={"ffn_hidden_size": model.ffn_hidden_size},
        submodules=_mlp_submodules(model.mlp_bias, row_parallel_splits),
    )
    mixture = _bind(
        KernelMoE,
        moe=model.moe,
        expert_ranks=sizes.expert,
        shared_experts=_mlp_submodules(has_bias=False, row_parallel_splits=row_parallel_splits),
    )
    layers_with_experts = model.moe.layers if model.moe is not None else ()
    layers = [
        _layer_spec(attention, mixture if layer in layers_with_experts else dense, recompute) for layer in stage_layers
    ]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=KernelRMSNorm)


def _mlp_submodules(has_bias: bool, row_parallel_splits: int) -> MLPSubmodules:
    params = {"has_bias": has_bias, "splits": row_parallel_splits}
    return MLPSubmodules(
        linear_fc1=ModuleSpec(module=KernelColumnLinear, params={**params, "num_blocks": 2}),
        linear_fc2=ModuleSpec(module=KernelSiluMulRowLinear, params=params),
        activation_func=NoActivation,
    )


def _bind(module: type, **arguments: object) -> type:
    """The class with arguments filled in. A ModuleSpec does that, but for an MLP that it does not know Megatron logs a
    warning per layer."""
    return type(module.__name__, (module,), {"__init__": partialmethod(module.__init__, **arguments)})


def _layer_spec(attention: ModuleSpec, mlp: ModuleSpec | type, recompute: bool) -> ModuleSpec:
    return ModuleSpec(
        module=RecomputedLayer if recompute else TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=KernelRMSNorm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=KernelRMSNorm,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
        ),
    )


def _attention_spec(model: ModelConfig, row_parallel_splits: int) -> ModuleSpec:
    if model.mla is not None:
        head_splits = math.gcd(model.num_heads, row_parallel_splits)
        submodules = LatentSelfAttentionSubmodules(
            column_linear=ModuleSpec(module=KernelColumnLinear, params={"has_bias": False, "splits": head_splits}),
            row_linear=ModuleSpec(module=KernelRowLinear, params={"has_bias": False, "splits": row_parallel_splits}),
            norm=KernelRMSNorm,
        )
        params = {"mla": model.mla, "splits": head_splits}
        return ModuleSpec(module=LatentSelfAttention, params=params, submodules=submodules)
    # Query groups are not cut: so many parts of them as any number of tensor-parallel ranks can ask for.
    group_splits = {"splits": math.gcd(model.num_kv_heads, row_parallel_splits)}
    head_norm = ModuleSpec(module=KernelHeadRMSNorm, params=group_splits) if model.qk_norm else None
    submodules = SelfAttentionSubmodules(
        linear_qkv=ModuleSpec(module=KernelColumnLinear, params={"has_bias": model.qkv_bias, **group_splits}),
        core_attention=ModuleSpec(module=KernelCoreAttention, params={"layer_windows": model.layer_windows}),
        linear_proj=ModuleSpec(
            module=KernelRowLinear, params={"has_bias": model.proj_bias, "splits": row_parallel_splits}
        ),
        q_layernorm=head_norm,
        k_layernorm=head_norm,
    )
    return ModuleSpec(module=SelfAttention, params={"attn_mask_type": AttnMaskType.causal}, submodules=submodules)
