"""The MLP of two linear layers, of which the first has a gate: SwiGLU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

from lockstep.engine.models.layers.layer import ModuleFactory
from lockstep.engine.models.layers.shard import Shard


@dataclass(frozen=True)
class GatedMLP:
    ffn_hidden_size: int
    has_bias: bool = False

    @property
    def token_width(self) -> int:
        return self.ffn_hidden_size

    def dimensions(self) -> Mapping[str, int]:
        return {"ffn": self.ffn_hidden_size, "gate_up": 2 * self.ffn_hidden_size}

    def row_widths(self) -> Mapping[str, int]:
        return {"intermediate_size": self.ffn_hidden_size}

    def shard(self, shard: Shard) -> GatedMLP:
        return replace(self, ffn_hidden_size=self.ffn_hidden_size // shard.size)

    def build(self, factory: ModuleFactory) -> GatedMLPModule:
        return GatedMLPModule(self, factory)


class GatedMLPModule(nn.Module):
    def __init__(self, spec: GatedMLP, factory: ModuleFactory) -> None:
        super().__init__()
        hidden_size, ffn = factory.hidden_size, spec.ffn_hidden_size
        self.linear_fc1 = factory.linear(2 * ffn, hidden_size, spec.has_bias)
        self.linear_fc2 = factory.row_linear(hidden_size, ffn, spec.has_bias)
        self._linears = (self.linear_fc1, self.linear_fc2)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        linear_fc1, linear_fc2 = self._linears
        return linear_fc2.product(linear_fc1.silu_product(hidden))
