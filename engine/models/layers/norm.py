"""RMSNorm: its options, and the module that holds its weight."""

from dataclasses import dataclass

import torch
from torch import nn

from lockstep.kernels.norm_rope.rms_norm import add_rms_norm, rms_norm


@dataclass(frozen=True)
class NormSpec:
    """eps: added to the mean of squares."""

    eps: float


class Norm(nn.Module):
    def __init__(self, size: int, spec: NormSpec, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.eps = spec.eps
        self.weight = nn.Parameter(torch.empty(size, dtype=dtype, device=device), requires_grad=False)
        self._weight = (self.weight,)  # a look-up in nn.Module takes a microsecond

    def normed(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self._weight[0], self.eps)

    def add_normed(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(the norm of x + residual, x + residual)."""
        return add_rms_norm(x, residual, self._weight[0], self.eps)
