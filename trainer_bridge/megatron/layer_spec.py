"""The modules that put lockstep.kernels into Megatron-core's transformer layer, and the spec that names them.

Megatron-core keeps what is its own: parameter names and layout, sharded state, residual adds, the order of calls.
Each module here holds no arithmetic: it calls the kernel that the engine calls, so the bits are the engine's.
"""

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial, partialmethod
from typing import Any

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
from lockstep.engine.models.layers.attention import GroupedAttention
from lockstep.engine.models.layers.latent_attention import LatentAttention
from lockstep.engine.models.layers.layer import LayerSpec
from lockstep.engine.models.layers.linear import LinearFormat
from lockstep.engine.models.layers.mlp import GatedMLP
from lockstep.engine.models.layers.moe import Experts
from lockstep.engine.models.layers.norm import NormSpec
from lockstep.kernels.attention.attention import attention_packed
from lockstep.kernels.linear.row_parallel_linear import row_parallel_linear
from lockstep.kernels.linear.silu_mul_linear import silu_mul_linear
from lockstep.kernels.norm_rope.rms_norm import rms_norm
from lockstep.kernels.norm_rope.rope import apply_rope
from lockstep.trainer_bridge.config import ParallelSizes
from lockstep.trainer_bridge.megatron.latent_attention import LatentSelfAttentionSubmodules, MegatronLatentAttention
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
    rope_tables: of RopeSpec.table, by the names of ModelConfig.ropes.
    """

    positions: torch.Tensor | None = None
    rope_tables: Mapping[str, torch.Tensor] | None = None

    @classmethod
    def of(
        cls, positions: torch.Tensor, cu_seqlens: torch.Tensor, rope_tables: Mapping[str, torch.Tensor]
    ) -> "PackedSequences":
        """cu_seqlens: int32 [B+1], the offsets of the sequences in the pack."""
        return cls(
            qkv_format="thd",
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens,
            positions=positions,
            rope_tables=rope_tables,
        )


class KernelRMSNorm(torch.nn.Module):
    """RMSNorm over the last dimension: of the hidden size, or of one head for the q and k norms.

    eps: Megatron's, one for all of a model; norm's counts where it is given.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, norm: NormSpec | None = None):
        super().__init__()
        self.eps = eps if norm is None else norm.eps
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

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, splits: int, norm: NormSpec):
        super().__init__(config, hidden_size, eps, norm)
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

    def __init__(self, *args, format: LinearFormat, has_bias: bool, splits: int, num_blocks: int = 1, **kwargs):
        super().__init__(*args, **{**kwargs, "bias": has_bias, "skip_bias_add": False})
        self.format, self.splits, self.num_blocks = format, splits, num_blocks

    def served_weight(self) -> torch.Tensor:
        """As the engine has it in its format; the gradient goes to the weight."""
        return self.format.as_served(self.weight)

    def forward(self, input_: torch.Tensor) -> tuple[torch.Tensor, None]:
        num_parts, in_parts = self.splits // self.tp_group.size(), self.splits > 1
        return column_parallel_linear(
            input_, self.served_weight(), self.bias, self.tp_group, num_parts, self.num_blocks, in_parts
        ), None


class KernelRowLinear(RowParallelLinear):
    """Row-parallel linear, as in the engine. splits: parts of the sum over the inner dimension of all ranks."""

    def __init__(self, *args, format: LinearFormat, has_bias: bool, splits: int, **kwargs):
        super().__init__(*args, **{**kwargs, "bias": has_bias, "skip_bias_add": False})
        self.format, self.own_splits = format, splits // self.tp_group.size()

    def forward(self, input_: torch.Tensor) -> tuple[torch.Tensor, None]:
        weight = self.format.as_served(self.weight)
        return row_parallel_linear(input_, weight, self.bias, self.own_splits, self._sum_over_ranks()), None

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
        sum_over_ranks, weight = self._sum_over_ranks(), self.format.as_served(self.weight)
        if sum_over_ranks is None:
            return silu_mul_linear(input_, weight, self.bias, self.own_splits), None
        out = sum_over_ranks(silu_mul_linear(input_, weight, None, self.own_splits))
        return out if self.bias is None else out + self.bias, None


class KernelMLP(MLP):
    """Megatron's, with the size of one layer, of which Megatron reads one of two from the model's configuration."""

    def __init__(self, config: TransformerConfig, *args, size: int, **kwargs):
        own = copy.copy(config)
        own.ffn_hidden_size = size
        group = parallel_state.get_tensor_model_parallel_group()
        super().__init__(own, *args, **{**kwargs, "ffn_hidden_size": size, "tp_group": group})


class KernelSelfAttention(SelfAttention):
    """Megatron's, with the sizes of one layer, where Megatron has those of the model."""

    def __init__(self, config: TransformerConfig, *args, mixer: GroupedAttention, **kwargs):
        own = copy.copy(config)
        own.num_attention_heads, own.num_query_groups = mixer.num_heads, mixer.num_kv_heads
        own.kv_channels = mixer.head_dim
        super().__init__(own, *args, **kwargs)


class KernelCoreAttention(torch.nn.Module):
    """Rotary embedding and packed causal attention."""

    def __init__(self, config: TransformerConfig, mixer: GroupedAttention, **unused):
        super().__init__()
        self.scale, self.window, self.rope = mixer.scale, mixer.window, mixer.rope

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
        table, positions = packed_seq_params.rope_tables[self.rope], packed_seq_params.positions
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


@dataclass(frozen=True)
class Numerics:
    """What changes bits, and is the engine's too: how sums are cut, and what is stored of the weights."""

    row_parallel_splits: int
    expert_ranks: int
    format: LinearFormat

    def linear(self, module: type, splits: int, has_bias: bool = False, **params) -> ModuleSpec:
        return ModuleSpec(module, params={"format": self.format, "splits": splits, "has_bias": has_bias, **params})


def block_spec(
    model: ModelConfig, recompute: bool, sizes: ParallelSizes, stage_layers: range, linear_format: LinearFormat
) -> TransformerBlockSubmodules:
    """The spec of the layers of one pipeline stage, by their numbers from 0, and of the final norm, which the last has.

    recompute: trade the activations inside a layer for a second forward pass.
    """
    numerics = Numerics(sizes.row_parallel_splits, sizes.expert, linear_format)
    layers = [_layer_spec(model.layers[layer], numerics, recompute) for layer in stage_layers]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=KernelRMSNorm)


def _layer_spec(layer: LayerSpec, numerics: Numerics, recompute: bool) -> ModuleSpec:
    norm = ModuleSpec(KernelRMSNorm, params={"norm": layer.norm})
    return ModuleSpec(
        module=RecomputedLayer if recompute else TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=MODULES[type(layer.mixer)](layer.mixer, numerics),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm,
            mlp=MODULES[type(layer.mlp)](layer.mlp, numerics),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def _grouped_attention(mixer: GroupedAttention, numerics: Numerics) -> ModuleSpec:
    # Query groups are not cut: so many parts of them as any number of tensor-parallel ranks can ask for.
    splits = math.gcd(mixer.num_kv_heads, numerics.row_parallel_splits)
    head_norm = None
    if mixer.qk_norm is not None:
        head_norm = ModuleSpec(KernelHeadRMSNorm, params={"splits": splits, "norm": mixer.qk_norm})
    submodules = SelfAttentionSubmodules(
        linear_qkv=numerics.linear(KernelColumnLinear, splits, mixer.qkv_bias),
        core_attention=ModuleSpec(KernelCoreAttention, params={"mixer": mixer}),
        linear_proj=numerics.linear(KernelRowLinear, numerics.row_parallel_splits, mixer.proj_bias),
        q_layernorm=head_norm,
        k_layernorm=head_norm,
    )
    params = {"attn_mask_type": AttnMaskType.causal, "mixer": mixer}
    return ModuleSpec(KernelSelfAttention, params=params, submodules=submodules)


def _latent_attention(mixer: LatentAttention, numerics: Numerics) -> ModuleSpec:
    splits = math.gcd(mixer.num_heads, numerics.row_parallel_splits)
    submodules = LatentSelfAttentionSubmodules(
        column_linear=numerics.linear(KernelColumnLinear, splits),
        row_linear=numerics.linear(KernelRowLinear, numerics.row_parallel_splits),
        norm=KernelRMSNorm,
    )
    params = {"mixer": mixer, "splits": splits, "format": numerics.format}
    return ModuleSpec(MegatronLatentAttention, params=params, submodules=submodules)


def _gated_mlp(mlp: GatedMLP, numerics: Numerics) -> type:
    return _bind(KernelMLP, submodules=_mlp_submodules(mlp, numerics), size=mlp.ffn_hidden_size)


def _experts(experts: Experts, numerics: Numerics) -> type:
    shared = GatedMLP(experts.shared_ffn_hidden_size) if experts.has_shared_experts else None
    return _bind(
        KernelMoE,
        moe=experts,
        expert_ranks=numerics.expert_ranks,
        format=numerics.format,
        shared_experts=shared and _gated_mlp(shared, numerics),
    )


def _mlp_submodules(mlp: GatedMLP, numerics: Numerics) -> MLPSubmodules:
    splits = numerics.row_parallel_splits
    return MLPSubmodules(
        linear_fc1=numerics.linear(KernelColumnLinear, splits, mlp.has_bias, num_blocks=2),
        linear_fc2=numerics.linear(KernelSiluMulRowLinear, splits, mlp.has_bias),
        activation_func=NoActivation,
    )


def _bind(module: type, **arguments: object) -> type:
    """The class with arguments filled in. A ModuleSpec does that, but for an MLP that it does not know Megatron logs a
    warning per layer."""
    return type(module.__name__, (module,), {"__init__": partialmethod(module.__init__, **arguments)})


# What Megatron builds of each part that a layer can have.
MODULES: dict[type, Callable[[Any, Numerics], ModuleSpec | type]] = {
    GroupedAttention: _grouped_attention,
    LatentAttention: _latent_attention,
    GatedMLP: _gated_mlp,
    Experts: _experts,
}
