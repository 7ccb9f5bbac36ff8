"""Rotary embeddings: a model's tables by name, of which each layer that turns its heads uses one."""

from dataclasses import dataclass
from typing import Any

import torch

from lockstep.kernels.norm_rope.rope import rope_cos_sin, rope_inv_freq


@dataclass(frozen=True)
class RopeSpec:
    """width: elements of a head that are turned; max_positions: rows of the table.

    scaling: None, or transformers' `rope_parameters` without rope_theta, with rope_type and (where the type needs it)
    original_max_position_embeddings always present.
    """

    width: int
    theta: float
    scaling: dict[str, Any] | None
    max_positions: int

    def table(self, device: torch.device | str) -> torch.Tensor:
        """Cosines and sines, fp32 [max_positions, width], see `kernels.rope_cos_sin`."""
        inv_freq, attention_factor = rope_inv_freq(self.width, self.theta, self.scaling, self.max_positions)
        return rope_cos_sin(inv_freq, attention_factor, self.max_positions).to(device)
