"""Differentiable steps between tensor-parallel ranks, and the column-parallel linear layer.

A gradient that is a sum over the columns, heads or tokens of the vocabulary which ranks share out is cut into the same
parts on any number of ranks, and the parts are added by tree_sum: so it has the same bits on any number of them. On one
rank with row_parallel_splits = 1 there is one part, and nothing here differs from the plain operation.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from lockstep.engine.ranks.rank_sum import sum_disjoint, sum_over_ranks
from lockstep.kernels.linear.linear import linear
from lockstep.kernels.linear.row_parallel_linear import tree_sum
from lockstep.kernels.memory.embedding import embedding, embedding_shard

Group = dist.ProcessGroup | None


def sum_partial_outputs(partial: Tensor, group: Group) -> Tensor:
    """The sum over ranks; its gradient, which is the same on all ranks, is each rank's."""
    return partial if group is None else _SumOutputs.apply(partial, group)


def sum_gradients(x: Tensor, group: Group) -> Tensor:
    """x itself, the same on all ranks; its gradient is the sum of the ranks' gradients."""
    return x if group is None else _SumGradients.apply(x, group)


def column_parallel_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, group: Group, num_parts: int, num_blocks: int, in_parts: bool
) -> Tensor:
    """linear(x, weight, bias), where x is the same on all ranks and weight[N, K] is this rank's columns of the output.

        dx = sum over ranks and parts of: sum over blocks of dy[:, rows] @ weight[rows]        added by tree_sum

    num_blocks: weight holds so many matrices one after the other (gate, up); each is cut into num_parts of its own.
    in_parts: false asks for the plain product's gradient, in one sum; for a single rank.
    """
    if not in_parts:
        return linear(x, weight, bias)
    return _ColumnParallelLinear.apply(x, weight, bias, group, num_parts, num_blocks)


def shared_by_parts(tensor: Tensor, num_parts: int, group: Group) -> Sequence[Tensor]:
    """`num_parts` times the tensor, the same on all ranks; its gradient is the tree_sum of all uses' gradients."""
    return _SharedByParts.apply(tensor, num_parts, group)


def join_rows(rows: Tensor, group: Group) -> Tensor:
    """What `kernels.moe.moe_experts` asks for. No gradient: that is joined in the same way."""
    return sum_disjoint(rows.contiguous(), group)


def vocabulary_parallel_embedding(token_ids: Tensor, weight: Tensor, first_token: int, group: Group) -> Tensor:
    """token_ids[T] -> [T, H], where weight[V / R, H] holds the tokens from first_token on; exact."""
    if group is None:
        return embedding(token_ids, weight)
    return _SumDisjoint.apply(embedding_shard(token_ids, weight, first_token), group)


class _SumOutputs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, partial, group):
        return sum_over_ranks(partial, group)

    @staticmethod
    def backward(ctx, dy):
        return dy, None


class _SumDisjoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx, own, group):
        return sum_disjoint(own.clone(), group)

    @staticmethod
    def backward(ctx, dy):
        return dy, None


class _SumGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dy):
        return sum_over_ranks(dy, ctx.group), None


class _SharedByParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor, num_parts, group):
        ctx.group = group
        return tuple(tensor.view_as(tensor) for _ in range(num_parts))

    @staticmethod
    def backward(ctx, *gradients):
        return sum_over_ranks(tree_sum(gradients), ctx.group), None, None


class _ColumnParallelLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, group, num_parts, num_blocks):
        ctx.save_for_backward(x, weight)
        ctx.group, ctx.num_parts, ctx.num_blocks = group, num_parts, num_blocks
        return linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        dy_MN = dy.reshape(-1, dy.shape[-1])
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        dx = None
        if needs_x:
            width = weight.shape[0] // (ctx.num_parts * ctx.num_blocks)
            products = [d @ w for d, w in zip(dy_MN.split(width, 1), weight.split(width, 0), strict=True)]
            # Block b of part p is number b * num_parts + p; a block of more than one is added to the part's others.
            parts = [sum(products[p + ctx.num_parts :: ctx.num_parts], products[p]) for p in range(ctx.num_parts)]
            dx = sum_over_ranks(tree_sum(parts), ctx.group).view(x.shape)
        dweight = dy_MN.t() @ x.reshape(-1, x.shape[-1]) if needs_weight else None
        return dx, dweight, dy_MN.sum(0) if needs_bias else None, None, None, None
