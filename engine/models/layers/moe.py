"""Mixture of experts: its sizes and routing, the one computation that engine and trainer share, and the module."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

from lockstep.engine.models.layers.layer import ModuleFactory
from lockstep.engine.models.layers.linear import Weights
from lockstep.engine.models.layers.mlp import GatedMLP
from lockstep.engine.models.layers.shard import Shard
from lockstep.kernels.linear.linear import linear
from lockstep.kernels.moe.moe_experts import JoinRows, moe_experts
from lockstep.kernels.moe.route_tokens import GroupScore, Scoring, route_tokens


@dataclass(frozen=True)
class Experts:
    """Sizes and routing. The options of routing are those of `route_tokens`.

    ffn_hidden_size:        of one expert.
    shared_ffn_hidden_size: of the MLP that every token passes beside its experts; None where there is none.
    has_expert_bias:        whether a bias takes part in the choice of experts. It is no weight: nothing trains it.
    fp32_logits:            the router's product is computed in fp32, else in the model's dtype.
    held_experts:           (first, end) of those whose weights this rank holds; None: all. The router is always whole.
    """

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

    @property
    def token_width(self) -> int:
        return self.experts_per_token * self.ffn_hidden_size + (self.shared_ffn_hidden_size or 0)

    def dimensions(self) -> Mapping[str, int]:
        shared = self.shared_ffn_hidden_size or 0
        return {
            "experts": self.num_experts,
            "held_experts": len(self.held),
            "expert_ffn": self.ffn_hidden_size,
            "expert_gate_up": 2 * self.ffn_hidden_size,
            "shared_ffn": shared,
            "shared_gate_up": 2 * shared,
        }

    def row_widths(self) -> Mapping[str, int]:
        shared = self.shared_ffn_hidden_size
        return {} if shared is None else {"shared experts' intermediate size": shared}

    def shard(self, shard: Shard) -> Experts:
        """Experts are whole: a rank has some or all of them. Shared experts are cut."""
        shared = self.shared_ffn_hidden_size and self.shared_ffn_hidden_size // shard.size
        own = shard.part_of(self.num_experts)
        held = (own.start, own.stop) if shard.expert_ranks > 1 else None
        return replace(self, shared_ffn_hidden_size=shared, held_experts=held)

    def build(self, factory: ModuleFactory) -> MixtureOfExperts:
        return MixtureOfExperts(self, factory)


def routed_experts(
    x: torch.Tensor,
    spec: Experts,
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
    logits = linear(x.float(), router_weight.float()) if spec.fp32_logits else linear(x, router_weight)
    expert_ids, expert_weights = route_tokens(
        logits,
        spec.experts_per_token,
        scoring=spec.scoring,
        expert_bias=expert_bias,
        num_groups=spec.num_groups,
        top_groups=spec.top_groups,
        group_score=spec.group_score,
        normalize=spec.normalize_weights,
        scale=spec.weight_scale,
    )
    return moe_experts(x, expert_ids, expert_weights, fc1_weight, fc2_weight, spec.held.start, join_rows)


class _Router(nn.Module):
    def __init__(self, spec: Experts, factory: ModuleFactory) -> None:
        super().__init__()
        weight = torch.empty(spec.num_experts, factory.hidden_size, dtype=factory.dtype, device=factory.device)
        bias = torch.empty(spec.num_experts, dtype=torch.float32, device=factory.device)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.expert_bias = nn.Parameter(bias, requires_grad=False) if spec.has_expert_bias else None


class _ExpertWeights(nn.Module):
    """The experts of a layer that this rank holds, in two tensors."""

    def __init__(self, spec: Experts, factory: ModuleFactory) -> None:
        super().__init__()
        num_experts, ffn, hidden_size = len(spec.held), spec.ffn_hidden_size, factory.hidden_size
        made = (factory.format, factory.dtype, factory.device)
        self.linear_fc1 = Weights((num_experts, 2 * ffn, hidden_size), *made)
        self.linear_fc2 = Weights((num_experts, hidden_size, ffn), *made)


class MixtureOfExperts(nn.Module):
    """A token's experts, weighted, plus the shared experts' output where there are any."""

    def __init__(self, spec: Experts, factory: ModuleFactory) -> None:
        super().__init__()
        self.spec, self.join_rows = spec, factory.join_rows
        self.router = _Router(spec, factory)
        self.experts = _ExpertWeights(spec, factory)
        self.shared_experts = None
        if spec.has_shared_experts:
            self.shared_experts = GatedMLP(spec.shared_ffn_hidden_size).build(factory)
        self._router_tensors = (self.router.weight, self.router.expert_bias)
        self._expert_weights = (self.experts.linear_fc1, self.experts.linear_fc2)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        weights = [weight.dense() for weight in self._expert_weights]
        routed = routed_experts(hidden, self.spec, *self._router_tensors, *weights, self.join_rows)
        return routed if self.shared_experts is None else routed + self.shared_experts(hidden)
