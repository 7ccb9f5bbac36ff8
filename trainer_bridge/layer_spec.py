"""The modules that put lockstep.kernels into Megatron-core's transformer layer, and the spec that names them.

Megatron-core keeps what is its own: parameter names and layout, sharded state, residual adds, the order of calls.
Each module here holds no arithmetic: it calls the kernel that the engine calls, so the bits are the engine's.
"""

from dataclasses import dataclass

import torch
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
from lockstep.kernels.attention import attention_packed
from lockstep.kernels.linear import linear
from lockstep.kernels.rms_norm import rms_norm
from lockstep.kernels.rope import apply_rope
from lockstep.kernels.silu_mul_linear import silu_mul_linear
from lockstep.trainer_bridge.latent_attention import LatentSelfAttention, LatentSelfAttentionSubmodules


@dataclass
class PackedSequences(PackedSeqParams):
    """Megatron's description of packed ("thd") sequences, with what our rotary embedding reads.

    positions: int64 [T], each token's position in its own sequence.
    rope_table: fp32 [P, D] of lockstep.kernels.rope.rope_cos_sin.
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


class KernelColumnLinear(ColumnParallelLinear):
    """Column-parallel linear whose product and bias are one call of the linear kernel.

    has_bias replaces Megatron's one switch for the biases of all linear layers.
    """

    def __init__(self, *args, has_bias: bool, **kwargs):
        super().__init__(*args, **{**kwargs, "bias": has_bias, "skip_bias_add": False})
        _require_one_tensor_parallel_rank(self)

    def _forward_impl(self, input, weight, bias, **communication):
        return linear(input, weight, bias)


class KernelRowLinear(RowParallelLinear):
    """Row-parallel linear; on one rank product and bias are one call of the linear kernel, as in the engine."""

    def __init__(self, *args, has_bias: bool, **kwargs):
        super().__init__(*args, **{**kwargs, "bias": has_bias, "skip_bias_add": False})
        _require_one_tensor_parallel_rank(self)

    def forward(self, input_: torch.Tensor) -> tuple[torch.Tensor, None]:
        return linear(input_, self.weight, self.bias), None


class NoActivation(MegatronModule):
    """Stands where Megatron's MLP calls its activation on the whole of linear_fc1's output: linear_fc2 does it."""

    def __init__(self, config: TransformerConfig):
        super().__init__(config)

    def forward(self, gate_up: torch.Tensor) -> torch.Tensor:
        return gate_up


class KernelSiluMulRowLinear(KernelRowLinear):
    """The MLP's second linear layer with the activation before it, [..., 2F] (gate | up) -> [..., H]."""

    def forward(self, input_: torch.Tensor) -> tuple[torch.Tensor, None]:
        return silu_mul_linear(input_, self.weight, self.bias), None


def _require_one_tensor_parallel_rank(module: ColumnParallelLinear | RowParallelLinear) -> None:
    if module.tp_group.size() != 1:
        raise NotImplementedError(f"{type(module).__name__} does not reduce over tensor-parallel ranks")


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


def block_spec(model: ModelConfig, recompute: bool) -> TransformerBlockSubmodules:
    """The spec of all transformer layers and the final norm.

    recompute: trade the activations inside a layer for a second forward pass.
    """
    mlp = MLPSubmodules(
        linear_fc1=ModuleSpec(module=KernelColumnLinear, params={"has_bias": model.mlp_bias}),
        linear_fc2=ModuleSpec(module=KernelSiluMulRowLinear, params={"has_bias": model.mlp_bias}),
        activation_func=NoActivation,
    )
    layer = ModuleSpec(
        module=RecomputedLayer if recompute else TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=KernelRMSNorm,
            self_attention=_attention_spec(model),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=KernelRMSNorm,
            mlp=ModuleSpec(module=MLP, params={"ffn_hidden_size": model.ffn_hidden_size}, submodules=mlp),
            mlp_bda=get_bias_dropout_add,
        ),
    )
    return TransformerBlockSubmodules(layer_specs=[layer] * model.num_layers, layer_norm=KernelRMSNorm)


def _attention_spec(model: ModelConfig) -> ModuleSpec:
    if model.mla is not None:
        submodules = LatentSelfAttentionSubmodules(
            column_linear=ModuleSpec(module=KernelColumnLinear, params={"has_bias": False}),
            row_linear=ModuleSpec(module=KernelRowLinear, params={"has_bias": False}),
            norm=KernelRMSNorm,
        )
        return ModuleSpec(module=LatentSelfAttention, params={"mla": model.mla}, submodules=submodules)
    submodules = SelfAttentionSubmodules(
        linear_qkv=ModuleSpec(module=KernelColumnLinear, params={"has_bias": model.qkv_bias}),
        core_attention=ModuleSpec(module=KernelCoreAttention, params={"layer_windows": model.layer_windows}),
        linear_proj=ModuleSpec(module=KernelRowLinear, params={"has_bias": model.proj_bias}),
        q_layernorm=KernelRMSNorm if model.qk_norm else None,
        k_layernorm=KernelRMSNorm if model.qk_norm else None,
    )
    return ModuleSpec(module=SelfAttention, params={"attn_mask_type": AttnMaskType.causal}, submodules=submodules)
