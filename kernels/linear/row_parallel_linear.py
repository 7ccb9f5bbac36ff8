"""Matrix product whose sum over K is cut into parts: the same bits from any number of tensor-parallel ranks."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lockstep.kernels.linear.linear import linear, product_gradients


def row_parallel_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    splits: int = 1,
    sum_over_ranks: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """x[..., K], weight[N, K], bias[N] | None -> [..., N] of x's dtype; K is this rank's part of the whole sum.

        parts = [linear(x[..., part], weight[:, part]) for part in equal parts of K]        each rounded to x's dtype
        y = sum_over_ranks(tree_sum(parts)) + bias                                          each addition rounded

    splits: the parts of this rank's K, a power of two that divides it. S parts on one rank, and S / R on each of R
    ranks whose sums are combined by `tree_sum` in the order of the ranks, are the same additions: the same bits.
    sum_over_ranks: maps this rank's sum to all ranks' sum; its gradient is the identity. Differentiable in all tensors;
    gradients do not depend on `splits`. Raises ValueError for splits that are no power of two or do not divide K.
    """
    if splits < 1 or splits & (splits - 1) or x.shape[-1] % splits:
        raise ValueError(f"row_parallel_linear: splits must be a power of two that divides {x.shape[-1]}, got {splits}")
    if splits == 1:
        y = linear(x, weight)
    elif torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        y = _SplitLinear.apply(x, weight, splits)
    else:
        y = _split_linear(x, weight, splits)
    y = y if sum_over_ranks is None else sum_over_ranks(y)
    return y if bias is None else y + bias


def tree_sum(parts: Sequence[Tensor]) -> Tensor:
    """The sum of 2^n tensors: neighbours are added, then neighbouring sums, and so on; every addition is rounded."""
    while len(parts) > 1:
        parts = [left + right for left, right in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


def _split_linear(x: Tensor, weight: Tensor, splits: int) -> Tensor:
    width = weight.shape[1] // splits
    return tree_sum(list(map(linear, x.split(width, dim=-1), weight.split(width, dim=1))))


class _SplitLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, splits):
        ctx.save_for_backward(x, weight)
        return _split_linear(x, weight, splits)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        needs_x, needs_weight, _ = ctx.needs_input_grad
        return *product_gradients(*ctx.saved_tensors, dy, needs_x, needs_weight), None
