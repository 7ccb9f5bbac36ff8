"""SwiGLU's activation and the product after it, as one step of the backward pass."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lockstep.kernels.linear.row_parallel_linear import row_parallel_linear
from lockstep.kernels.linear.silu_mul import silu_mul, silu_mul_backward


def silu_mul_linear(gate_up: Tensor, weight: Tensor, bias: Tensor | None = None, splits: int = 1) -> Tensor:
    """gate_up[..., 2F], weight[N, F], bias[N] | None -> [..., N].

        return row_parallel_linear(silu_mul(gate_up), weight, bias, splits)     the same bits, also of gradients

    Keeps gate_up alone for the backward pass, which computes the activations again: a third less than the two ops keep.
    Errors are those of the two ops.
    """
    if torch.is_grad_enabled() and (
        gate_up.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        return _SiluMulLinear.apply(gate_up, weight, bias, splits)
    return row_parallel_linear(silu_mul(gate_up), weight, bias, splits)


class _SiluMulLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up, weight, bias, splits):
        ctx.save_for_backward(gate_up, weight)
        return row_parallel_linear(silu_mul(gate_up), weight, bias, splits)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        gate_up, weight = ctx.saved_tensors
        needs_gate_up, needs_weight, needs_bias, _ = ctx.needs_input_grad
        dy_MN = dy.reshape(-1, dy.shape[-1])
        if needs_gate_up:
            dactivated = (dy_MN @ weight).view(*dy.shape[:-1], weight.shape[1])
            dgate_up, activated = silu_mul_backward(gate_up, dactivated)
        else:
            dgate_up, activated = None, silu_mul(gate_up)
        dweight = dy_MN.t() @ activated.reshape(-1, weight.shape[1]) if needs_weight else None
        return dgate_up, dweight, dy_MN.sum(0) if needs_bias else None, None
