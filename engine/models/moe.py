"""Mixture-of-experts layers: their shape, and the one computation that engine and trainer share."""

from dataclasses import dataclass

import torch

from lockstep.kernels.linear.linear import linear
from lockstep.kernels.moe.moe_experts import JoinRows, moe_experts
from lockstep.kernels.moe.route_tokens import GroupScore, Scoring, route_tokens


@dataclass(frozen=True)
class MoEConfig:
    """Sizes and routing of a model's mixture-of-experts layers. The options of routing are those of `route_tokens`.

    layers:                 indices of the layers that have experts; the others have a dense MLP.
    ffn_hidden_size:        of one expert.
    shared_ffn_hidden_size: of the MLP that every token passes beside its experts; None where there is none.
    has_expert_bias:        whether a bias takes part in the choice of experts. It is no weight: nothing trains it.
    fp32_logits:            the router's product is computed in fp32, else in the model's dtype.
    held_experts:           (first, end) of those whose weights this rank holds; None: all. The router is always whole.
    """

    layers: tuple[int, ...]
    num_experts: int
    experts_per_token: int
    ffn_hidden_size: int
    shared_ffn_hidden_size: int | None = None
    scoring: Scoring = "softmax"
    has_expert_bias: bool = False
    num_groups: int = 1
    top_groups: int = 1
    group_score: GroupScore = "max"
    normalize_weights: bool = False
    weight_scale: float = 1.0
    fp32_logits: bool = False
    held_experts: tuple[int, int] | None = None

    @property
    def held(self) -> range:
        return range(*(self.held_experts or (0, self.num_experts)))

    @property
    def has_shared_experts(self) -> bool:
        return self.shared_ffn_hidden_size is not None


def routed_experts(
    x: torch.Tensor,
    moe: MoEConfig,
    router_weight: torch.Tensor,
    expert_bias: torch.Tensor | None,
    fc1_weight: torch.Tensor,
    fc2_weight: torch.Tensor,
    join_rows: JoinRows | None = None,
) -> torch.Tensor:
    """x[T, H] -> [T, H]: each token through its experts, without the shared ones. Differentiable.

    router_weight [E, H]; expert_bias fp32 [E] | None; fc1_weight [L, 2F, H] and fc2_weight [L, H, F] of the L experts
    that this rank holds. join_rows: see `moe_experts`; None where that is all of them.
    """
    # A load-balancing loss would be computed from these logits and the expert ids, in the trainer alone.
    logits = linear(x.float(), router_weight.float()) if moe.fp32_logits else linear(x, router_weight)
    expert_ids, expert_weights = route_tokens(
        logits,
        moe.experts_per_token,
        scoring=moe.scoring,
        expert_bias=expert_bias,
        num_groups=moe.num_groups,
        top_groups=moe.top_groups,
        group_score=moe.group_score,
        normalize=moe.normalize_weights,
        scale=moe.weight_scale,
    )
    return moe_experts(x, expert_ids, expert_weights, fc1_weight, fc2_weight, moe.held.start, join_rows)
