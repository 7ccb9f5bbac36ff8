"""A mixture-of-experts layer for Megatron-core's transformer layer, in the place of its MLP.

Megatron's own MoELayer moves tokens between ranks through dispatchers and multiplies them with kernels of its own. This
one calls what the engine calls, so the bits are the engine's. Parameters have the names and the layout of the engine's.
"""

import copy

import torch
from megatron.core import parallel_state
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from lockstep.engine.models.moe import MoEConfig, routed_experts


class KernelMoE(MegatronModule):
    """A token's experts, weighted, plus the shared experts' output where there are any.

    moe: the layer's sizes and routing. shared_experts: the linear layers of the shared experts' MLP.
    """

    def __init__(self, config: TransformerConfig, moe: MoEConfig, shared_experts: MLPSubmodules):
        super().__init__(config)
        _require_one_rank()
        self.moe = moe
        num_experts, ffn, hidden = moe.num_experts, moe.ffn_hidden_size, config.hidden_size
        self.router = _Router(config, moe)
        self.experts = MegatronModule(config)
        self.experts.linear_fc1 = _Weight(config, num_experts, 2 * ffn, hidden)
        self.experts.linear_fc2 = _Weight(config, num_experts, hidden, ffn)
        self.shared_experts = None
        if moe.has_shared_experts:
            # Megatron's MLP reads one of its two sizes from the configuration.
            shared_config = copy.deepcopy(config)
            shared_config.ffn_hidden_size = moe.shared_ffn_hidden_size
            self.shared_experts = MLP(
                shared_config,
                shared_experts,
                ffn_hidden_size=moe.shared_ffn_hidden_size,
                tp_group=parallel_state.get_tensor_model_parallel_group(),
            )

    def forward(self, hidden: torch.Tensor, padding_mask: None = None) -> tuple[torch.Tensor, None]:
        """[T, 1, H] -> [T, 1, H], and no bias to be added."""
        out = routed_experts(
            hidden.flatten(0, 1),
            self.moe,
            self.router.weight,
            self.router.expert_bias,
            self.experts.linear_fc1.weight,
            self.experts.linear_fc2.weight,
        ).view(hidden.shape)
        if self.shared_experts is not None:
            out = out + self.shared_experts(hidden)[0]
        return out, None


class _Weight(MegatronModule):
    """A named place for one weight; every rank's checkpoint holds the whole."""

    def __init__(self, config: TransformerConfig, *shape: int):
        super().__init__(config)
        self.weight = torch.nn.Parameter(torch.empty(shape, dtype=config.params_dtype, device=_device(config)))


class _Router(_Weight):
    def __init__(self, config: TransformerConfig, moe: MoEConfig):
        super().__init__(config, moe.num_experts, config.hidden_size)
        self.expert_bias = None
        if moe.has_expert_bias:
            bias = torch.empty(moe.num_experts, dtype=torch.float32, device=_device(config))
            self.expert_bias = torch.nn.Parameter(bias, requires_grad=False)


def _device(config: TransformerConfig) -> str | int:
    return "cpu" if config.use_cpu_initialization else torch.cuda.current_device()


def _require_one_rank() -> None:
    tensor_parallel = parallel_state.get_tensor_model_parallel_world_size()
    expert_parallel = parallel_state.get_expert_model_parallel_world_size()
    if (tensor_parallel, expert_parallel) != (1, 1):
        raise NotImplementedError(
            "a trainer's mixture-of-experts layer holds all experts whole: tensor- and expert-parallel sizes are "
            f"{tensor_parallel} and {expert_parallel}, not 1"
        )
