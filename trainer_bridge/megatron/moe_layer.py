"""A mixture-of-experts layer for Megatron-core's transformer layer, in the place of its MLP.

Megatron's own MoELayer moves tokens between ranks through dispatchers and multiplies them with kernels of its own. This
one calls what the engine calls, so the bits are the engine's. Parameters have the names and the layout of the engine's.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from megatron.core import parallel_state
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from lockstep.engine.models.layers.linear import LinearFormat
from lockstep.engine.models.layers.moe import Experts, routed_experts
from lockstep.engine.models.layers.shard import Shard
from lockstep.trainer_bridge.megatron.tensor_parallel import join_rows


class KernelMoE(MegatronModule):
    """A token's experts, weighted, plus the shared experts' output where there are any.

    moe: the layer's sizes and routing. expert_ranks: see ParallelSizes.expert. format: of the experts' weights.
    shared_experts: makes the shared experts' MLP of Megatron's configuration; None where there are none.

    A tensor-parallel rank routes all tokens, as every other does. Where it holds some of the experts, it is sent the
    outputs of the others for all tokens, and their gradients: no sum is taken over ranks.
    """

    def __init__(
        self,
        config: TransformerConfig,
        moe: Experts,
        expert_ranks: int,
        format: LinearFormat,
        shared_experts: Callable[[TransformerConfig], torch.nn.Module] | None,
    ):
        super().__init__(config)
        self.moe, self.format, self.join_rows = moe, format, None
        if expert_ranks > 1:
            group = parallel_state.get_tensor_model_parallel_group()
            held = Shard(group.rank(), expert_ranks).part_of(moe.num_experts)
            self.moe = replace(moe, held_experts=(held.start, held.stop))
            self.join_rows = partial(join_rows, group=group)
        num_experts, ffn, hidden = len(self.moe.held), moe.ffn_hidden_size, config.hidden_size
        self.router = _Router(config, moe)
        self.experts = MegatronModule(config)
        self.experts.linear_fc1 = _Weight(config, num_experts, 2 * ffn, hidden)
        self.experts.linear_fc2 = _Weight(config, num_experts, hidden, ffn)
        self.shared_experts = shared_experts and shared_experts(config)

    def forward(self, hidden: torch.Tensor, padding_mask: None = None) -> tuple[torch.Tensor, None]:
        """[T, 1, H] -> [T, 1, H], and no bias to be added."""
        out = routed_experts(
            hidden.flatten(0, 1),
            self.moe,
            self.router.weight,
            self.router.expert_bias,
            self.format.as_served(self.experts.linear_fc1.weight),
            self.format.as_served(self.experts.linear_fc2.weight),
            self.join_rows,
        ).view(hidden.shape)
        if self.shared_experts is not None:
            out = out + self.shared_experts(hidden)[0]
        return out, None


class _Weight(MegatronModule):
    """A named place for one weight, the same on all tensor-parallel ranks."""

    def __init__(self, config: TransformerConfig, *shape: int):
        super().__init__(config)
        self.weight = torch.nn.Parameter(torch.empty(shape, dtype=config.params_dtype, device=_device(config)))


class _Router(_Weight):
    def __init__(self, config: TransformerConfig, moe: Experts):
        super().__init__(config, moe.num_experts, config.hidden_size)
        self.expert_bias = None
        if moe.has_expert_bias:
            bias = torch.empty(moe.num_experts, dtype=torch.float32, device=_device(config))
            self.expert_bias = torch.nn.Parameter(bias, requires_grad=False)


def _device(config: TransformerConfig) -> str | int:
    return "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
