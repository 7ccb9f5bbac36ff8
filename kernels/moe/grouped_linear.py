"""Matrix products of groups of rows, each group with its own weight: the experts of a mixture."""

from itertools import pairwise

import torch
import triton
import triton.language as tl
from torch import Tensor

from lockstep.kernels.linear.linear import linear

# As in `linear`: the K tile is part of the meaning of the bits; the others are free.
_BLOCK_K = 64


def grouped_linear(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """x[A, K], weight[G, N, K], offsets int64 [G + 1] (ascending, in 0 .. A) -> [A, N] of x's dtype.

        y[r] = linear(x[r], weight[g])        for offsets[g] <= r < offsets[g + 1]; other rows hold anything

    The sum over K runs in the order of `linear`, so a row's bits depend on that row and its group's weight alone. On a
    GPU `offsets` are read by the kernel only: nothing waits for them, and a captured graph serves any groups. Not
    differentiable by itself: see `moe_experts`. On the CPU only float32 (other dtypes raise ValueError).
    """
    return _grouped_linear_triton(x, weight, offsets) if x.is_cuda else _grouped_linear_cpu(x, weight, offsets)


def grouped_linear_reference(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """The formula of `grouped_linear` in plain torch, in any dtype."""
    group = torch.searchsorted(offsets, torch.arange(x.shape[0], dtype=torch.int64, device=x.device), right=True) - 1
    return torch.einsum("ak,ank->an", x, weight[group])


def grouped_weight_gradient(dy: Tensor, x: Tensor, offsets: Tensor) -> Tensor:
    """dy[A, N], x[A, K], offsets int64 [G + 1] -> [G, N, K] of x's dtype: the gradient of grouped_linear's weight.

        dweight[g] = round(sum over rows r of group g, in ascending order, of outer(dy[r], x[r]))        in fp32

    A group without rows has a gradient of 0.
    """
    if x.is_cuda:
        return _weight_gradient_triton(dy, x, offsets)
    return torch.stack([dy[rows].t() @ x[rows] for rows in _rows_of_groups(offsets)])


def _grouped_linear_cpu(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    y = x.new_zeros(x.shape[0], weight.shape[1])
    for rows, weight_g in zip(_rows_of_groups(offsets), weight.unbind(), strict=True):
        if rows.start < rows.stop:
            y[rows] = linear(x[rows], weight_g)
    return y


def _rows_of_groups(offsets: Tensor) -> list[slice]:
    return [slice(start, stop) for start, stop in pairwise(offsets.tolist())]


def _grouped_linear_triton(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    x = x if x.stride(1) == 1 else x.contiguous()
    (num_rows, k), (num_groups, n) = x.shape, weight.shape[:2]
    y = torch.empty(num_rows, n, dtype=x.dtype, device=x.device)
    if num_rows and n:
        block_m = 16 if num_rows <= 16 * num_groups else 64
        block_n = 64 if block_m == 16 else 128
        # The number of row tiles is known on the device alone: a group may leave one tile that is not full.
        max_row_tiles = min(num_rows, num_rows // block_m + num_groups)
        _grouped_linear_kernel[(max_row_tiles * triton.cdiv(n, block_n),)](
            x, weight, y, offsets, n, k, num_groups, max_row_tiles, x.stride(0), *weight.stride(),
            BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=_BLOCK_K, GROUPS=triton.next_power_of_2(num_groups),
            num_warps=4, num_stages=4,
        )  # fmt: skip
    return y


@triton.jit
def _grouped_linear_kernel(
    x_ptr, weight_ptr, y_ptr, offsets_ptr, N, K, num_groups, max_row_tiles, stride_x, stride_group, stride_n, stride_k,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    # Row tiles are numbered group by group; programs that run together share a tile of a group's weight.
    row_tile = tl.program_id(0) % max_row_tiles
    columns = ((tl.program_id(0) // max_row_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    groups = tl.arange(0, GROUPS)
    starts = tl.load(offsets_ptr + groups, mask=groups < num_groups, other=0)
    stops = tl.load(offsets_ptr + groups + 1, mask=groups < num_groups, other=0)
    num_tiles = (stops - starts + BLOCK_M - 1) // BLOCK_M
    group = tl.sum((tl.cumsum(num_tiles, axis=0) <= row_tile).to(tl.int32), axis=0)
    if group < num_groups:
        tile_in_group = row_tile - tl.sum(tl.where(groups < group, num_tiles, 0), axis=0)
        rows = tl.load(offsets_ptr + group) + tile_in_group * BLOCK_M + tl.arange(0, BLOCK_M)
        in_group = rows < tl.load(offsets_ptr + group + 1)
        weight_ptr += group.to(tl.int64) * stride_group
        accumulator = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in range(0, K, BLOCK_K):
            ks = start + tl.arange(0, BLOCK_K)
            x = tl.load(
                x_ptr + rows[:, None] * stride_x + ks[None, :], mask=in_group[:, None] & (ks < K)[None, :], other=0.0
            )
            weight = tl.load(
                weight_ptr + columns[None, :] * stride_n + ks[:, None] * stride_k,
                mask=(columns < N)[None, :] & (ks < K)[:, None],
                other=0.0,
            )
            accumulator = tl.dot(x, weight, accumulator, input_precision="ieee")
        tl.store(
            y_ptr + rows[:, None] * N + columns[None, :],
            accumulator.to(y_ptr.dtype.element_ty),
            mask=in_group[:, None] & (columns < N)[None, :],
        )


def _weight_gradient_triton(dy: Tensor, x: Tensor, offsets: Tensor) -> Tensor:
    dy, x = dy.contiguous(), x.contiguous()
    num_groups, n, k = offsets.shape[0] - 1, dy.shape[1], x.shape[1]
    dweight = torch.empty(num_groups, n, k, dtype=x.dtype, device=x.device)
    if dweight.numel():
        block = 64 if n <= 64 or k <= 64 else 128
        grid = (triton.cdiv(n, block) * triton.cdiv(k, block), num_groups)
        _weight_gradient_kernel[grid](
            dy, x, dweight, offsets, n, k, BLOCK_N=block, BLOCK_K=block, BLOCK_ROWS=32, num_warps=8, num_stages=3
        )
    return dweight


@triton.jit
def _weight_gradient_kernel(
    dy_ptr, x_ptr, dweight_ptr, offsets_ptr, N, K,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(1).to(tl.int64)
    tiles_k = tl.cdiv(K, BLOCK_K)
    ns = (tl.program_id(0) // tiles_k) * BLOCK_N + tl.arange(0, BLOCK_N)
    ks = (tl.program_id(0) % tiles_k) * BLOCK_K + tl.arange(0, BLOCK_K)
    stop = tl.load(offsets_ptr + group + 1)
    accumulator = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for start in range(tl.load(offsets_ptr + group), stop, BLOCK_ROWS):
        rows = start + tl.arange(0, BLOCK_ROWS).to(tl.int64)
        dy = tl.load(dy_ptr + rows[None, :] * N + ns[:, None], mask=(rows < stop)[None, :] & (ns < N)[:, None], other=0)
        x = tl.load(x_ptr + rows[:, None] * K + ks[None, :], mask=(rows < stop)[:, None] & (ks < K)[None, :], other=0)
        accumulator = tl.dot(dy, x, accumulator, input_precision="ieee")
    tl.store(
        dweight_ptr + group * N * K + ns[:, None].to(tl.int64) * K + ks[None, :],
        accumulator.to(dweight_ptr.dtype.element_ty),
        mask=(ns < N)[:, None] & (ks < K)[None, :],
    )
