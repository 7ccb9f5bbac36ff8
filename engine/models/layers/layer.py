"""A layer as a record of its parts, and the module that the engine makes of it.

A part (a mixer, which lets tokens see others, or an MLP) is a frozen dataclass. It gives what the rest of the engine
and the trainer must know of it: names of sizes for the name tables, what ranks share out, what it keeps in the cache,
its arithmetic, and its module. A new kind of part touches nothing else here; docs/extending.md walks through one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import nn

from lockstep.engine.memory.layer_caches import CacheSpec, LayerCache
from lockstep.engine.models.layers.context import AttentionContext, PlanKey
from lockstep.engine.models.layers.linear import PLAIN, Linear, LinearFormat, RowLinear, SumOverRanks
from lockstep.engine.models.layers.norm import Norm, NormSpec
from lockstep.engine.models.layers.shard import Shard
from lockstep.kernels.moe.moe_experts import JoinRows


@dataclass(frozen=True)
class ModuleFactory:
    """Makes the modules of a rank's layers: on its device, in the model's dtype, linear layers in the given format.

    hidden_size: of the rows that pass from layer to layer. splits, sum_over_ranks: see RowLinear. join_rows: see
    `kernels.moe_experts`; None for a rank that holds all experts.
    """

    hidden_size: int
    device: torch.device
    dtype: torch.dtype
    format: LinearFormat = PLAIN
    splits: int = 1
    sum_over_ranks: SumOverRanks | None = None
    join_rows: JoinRows | None = None

    def linear(self, rows: int, columns: int, bias: bool = False) -> Linear:
        return Linear(rows, columns, self.format, self.dtype, self.device, bias)

    def row_linear(self, rows: int, columns: int, bias: bool = False) -> RowLinear:
        sums = {"splits": self.splits, "sum_over_ranks": self.sum_over_ranks}
        return RowLinear(rows, columns, self.format, self.dtype, self.device, bias, **sums)

    def norm(self, size: int, spec: NormSpec) -> Norm:
        return Norm(size, spec, self.dtype, self.device)


class LayerPart(Protocol):
    """What a mixer and an MLP have in common."""

    def dimensions(self) -> Mapping[str, int]:
        """The sizes that its rules in the name tables are written in, beside "hidden"."""

    def row_widths(self) -> Mapping[str, int]:
        """The inner sizes of its row-parallel products, which ranks and row_parallel_splits cut, by what they are."""

    def shard(self, shard: Shard) -> LayerPart:
        """A rank's part."""

    def build(self, factory: ModuleFactory) -> nn.Module:
        """The engine's module, whose parameters have the names and shapes of the rules."""


class Mixer(LayerPart, Protocol):
    """rope: which of the model's tables turns its heads; None for none. window: see `kernels.attention`.

    Its module's `forward(hidden, positions, rope_table, cache, context)` -> hidden.
    """

    rope: str | None
    window: int | None

    @property
    def heads(self) -> tuple[str, int]:
        """What ranks share out whole: its name and number."""

    @property
    def cache(self) -> CacheSpec:
        """What it keeps of a token."""

    @property
    def plan_key(self) -> PlanKey | None:
        """Of the AttentionPlan that its kernel takes for few rows on a GPU; None for a kernel that takes none."""

    @property
    def pair_flops(self) -> int:
        """Of a query and a key that it sees."""

    def head_matrices(self) -> set[tuple[int, int]]:
        """(rows, columns) of matrices that it holds for each head, in one weight."""


class MLP(LayerPart, Protocol):
    """Its module's `forward(hidden)` -> hidden."""

    @property
    def token_width(self) -> int:
        """Inner elements that it computes for a token."""


@dataclass(frozen=True)
class LayerSpec:
    """norm: before the mixer and before the MLP."""

    mixer: Mixer
    mlp: MLP
    norm: NormSpec

    @property
    def parts(self) -> tuple[LayerPart, ...]:
        return self.mixer, self.mlp

    def shard(self, shard: Shard) -> LayerSpec:
        return replace(self, mixer=self.mixer.shard(shard), mlp=self.mlp.shard(shard))


class Layer(nn.Module):
    def __init__(self, spec: LayerSpec, factory: ModuleFactory) -> None:
        super().__init__()
        self.input_layernorm = factory.norm(factory.hidden_size, spec.norm)
        self.self_attention = spec.mixer.build(factory)
        self.pre_mlp_layernorm = factory.norm(factory.hidden_size, spec.norm)
        self.mlp = spec.mlp.build(factory)
        # A look-up of a module in nn.Module takes a microsecond.
        self._modules_in_order = (self.input_layernorm, self.self_attention, self.pre_mlp_layernorm, self.mlp)

    def forward(
        self,
        hidden: torch.Tensor,
        residual: torch.Tensor | None,
        positions: torch.Tensor,
        rope_table: torch.Tensor | None,
        cache: LayerCache,
        context: AttentionContext,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """hidden: the previous layer's MLP output, not yet added to `residual` (None before the first layer)."""
        input_layernorm, mixer, pre_mlp_layernorm, mlp = self._modules_in_order
        if residual is None:
            residual = hidden
            hidden = input_layernorm.normed(hidden)
        else:
            hidden, residual = input_layernorm.add_normed(hidden, residual)
        hidden = mixer(hidden, positions, rope_table, cache, context)
        if context.rows is not None:
            residual = residual[context.rows]
        hidden, residual = pre_mlp_layernorm.add_normed(hidden, residual)
        return mlp(hidden), residual
