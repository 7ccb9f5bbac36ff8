"""A linear layer with SwiGLU's activation: one kernel for the few rows of a decode step, and for many rows."""

import torch
from torch import Tensor

from lockstep.kernels.linear.linear import linear
from lockstep.kernels.linear.linear_decode import MAX_ROWS, can_decode, linear_decode
from lockstep.kernels.linear.linear_silu_mul_hopper import linear_silu_mul_hopper, wins
from lockstep.kernels.linear.silu_mul import silu_mul


def linear_silu_mul(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x[..., K], weight[2F, K] (gate rows, then up rows), bias[2F] | None -> [..., F] of x's dtype.

        y = silu_mul(linear(x, weight, bias))        to the bit

    Differentiable in all three.
    """
    needs_grad = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    if x.is_cuda and bias is None and not needs_grad:
        if can_decode(x, weight, MAX_ROWS):
            return linear_decode(x, weight, silu_mul=True)
        if wins(x, weight):
            return linear_silu_mul_hopper(x, weight)
    return silu_mul(linear(x, weight, bias))
