"""A matrix product of its own for each head, where a row's bits depend on that row and the weight alone."""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from lockstep.kernels.linear.linear import padded_rows

# Part of the meaning of the bits; the tiles of rows and columns are free.
_BLOCK_K = 64


def head_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x[T, H, K], weight[H, N, K] -> [T, H, N] of x's dtype.

        y[t, h, n] = round(sum over k of x[t, h, k] * weight[h, n, k])        accumulated in fp32

    Any strides. Differentiable in both. On the CPU only float32; shapes that do not fit raise ValueError. Rows are
    independent under the condition that `linear` names.
    """
    if x.ndim != 3 or weight.ndim != 3 or (x.shape[1], x.shape[2]) != (weight.shape[0], weight.shape[2]):
        raise ValueError(f"head_linear: x {tuple(x.shape)} and weight {tuple(weight.shape)} do not fit")
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _HeadLinear.apply(x, weight)
    return _head_linear_forward(x, weight)


def head_linear_reference(x: Tensor, weight: Tensor) -> Tensor:
    """The formula of `head_linear` in plain torch, in any dtype."""
    return torch.einsum("thk,hnk->thn", x, weight)


def _head_linear_forward(x: Tensor, weight: Tensor) -> Tensor:
    return (_head_linear_triton if x.is_cuda else _head_linear_cpu)(x, weight)


def _head_linear_cpu(x: Tensor, weight: Tensor) -> Tensor:
    if x.dtype != torch.float32:
        raise ValueError(f"head_linear on the CPU takes float32, not {x.dtype}")
    num_rows, num_heads, _ = x.shape
    padding = padded_rows(num_rows, weight.shape[1]) - num_rows
    x_HMK = F.pad(x.transpose(0, 1), (0, 0, 0, padding)).contiguous()
    y_HMN = torch.empty(num_heads, num_rows + padding, weight.shape[1], dtype=torch.float32, device="cpu")
    # A product a head: torch's batched one has other bits, and other ones again for other numbers of rows.
    for x_MK, weight_KN, y_MN in zip(x_HMK.unbind(), weight.mT.unbind(), y_HMN.unbind(), strict=True):
        torch.mm(x_MK, weight_KN, out=y_MN)
    return y_HMN[:, :num_rows].transpose(0, 1)


def _head_linear_triton(x: Tensor, weight: Tensor) -> Tensor:
    (m, num_heads, k), n = x.shape, weight.shape[1]
    y = torch.empty(m, num_heads, n, dtype=x.dtype, device=x.device)
    if y.numel():
        block_m, block_n = 16 if m <= 16 else 64, 64
        grid = (triton.cdiv(m, block_m) * triton.cdiv(n, block_n), num_heads)
        _head_linear_kernel[grid](
            x, weight, y, m, n, k, *x.stride(), *weight.stride(), y.stride(0), y.stride(1),
            BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=_BLOCK_K, num_warps=4, num_stages=3,
        )  # fmt: skip
    return y


@triton.jit
def _head_linear_kernel(
    x_ptr, weight_ptr, y_ptr, M, N, K, x_stride_m, x_stride_h, x_stride_k, weight_stride_h, weight_stride_n,
    weight_stride_k, y_stride_m, y_stride_h, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tiles_n = tl.cdiv(N, BLOCK_N)
    head = tl.program_id(1).to(tl.int64)
    rows = (tl.program_id(0) // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    columns = (tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    x_ptr += head * x_stride_h
    weight_ptr += head * weight_stride_h
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        ks = start + tl.arange(0, BLOCK_K)
        x = tl.load(
            x_ptr + rows[:, None] * x_stride_m + ks[None, :] * x_stride_k,
            mask=(rows < M)[:, None] & (ks < K)[None, :],
            other=0.0,
        )
        weight = tl.load(
            weight_ptr + columns[None, :] * weight_stride_n + ks[:, None] * weight_stride_k,
            mask=(columns < N)[None, :] & (ks < K)[:, None],
            other=0.0,
        )
        accumulator = tl.dot(x, weight, accumulator, input_precision="ieee")
    tl.store(
        y_ptr + rows[:, None] * y_stride_m + head * y_stride_h + columns[None, :],
        accumulator.to(y_ptr.dtype.element_ty),
        mask=(rows < M)[:, None] & (columns < N)[None, :],
    )


class _HeadLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return _head_linear_forward(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        needs_x, needs_weight = ctx.needs_input_grad
        dy_HMN = dy.transpose(0, 1)
        dx = torch.bmm(dy_HMN, weight).transpose(0, 1) if needs_x else None
        dweight = torch.bmm(dy_HMN.mT, x.transpose(0, 1)) if needs_weight else None
        return dx, dweight
