"""RMS normalisation, alone and fused with the residual addition before it."""

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from lockstep.kernels._cpu import address_of, exact_njit, fma32, inline_njit, njit, parallel_rows, row32
from lockstep.kernels._triton import begin_overlapped, launches_overlap, tree_sum

_ELEMENTS_PER_THREAD = 65536
_ZERO = np.float32(0.0)
_ONE = np.float32(1.0)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x[..., H], weight[H] -> [..., H] of x's dtype (the norm of transformers' Llama and Qwen models).

        rstd = 1 / sqrt(mean(x^2 over H) + eps)        in fp32
        y = round(weight * round(x * rstd))

    x may be strided, as a slice of heads [T, N, D] of a fused projection is. Differentiable in x and weight. Shapes
    that do not fit raise ValueError, as does any dtype but float32 on the CPU.
    """
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _RmsNorm.apply(x, weight, eps)
    return _rms_norm_forward(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x[..., H], residual[..., H], weight[H] -> (normed[..., H], summed[..., H]).

        summed = round(x + residual)
        normed = rms_norm(summed, weight, eps)        the same bits as these two steps apart

    Differentiable in all three tensors. Shapes that do not fit raise ValueError, as does any dtype but float32 on the
    CPU.
    """
    if torch.is_grad_enabled() and (x.requires_grad or residual.requires_grad or weight.requires_grad):
        return _AddRmsNorm.apply(x, residual, weight, eps)
    return _add_rms_norm_forward(x, residual, weight, eps)


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The formula of `rms_norm` in plain torch; at least fp32, fp64 stays fp64."""
    x_wide = x.to(torch.promote_types(x.dtype, torch.float32))
    rstd = torch.rsqrt(x_wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * (x_wide * rstd).to(x.dtype)


def add_rms_norm_reference(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The formula of `add_rms_norm` in plain torch."""
    summed = x + residual
    return rms_norm_reference(summed, weight, eps), summed


def _rms_norm_forward(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    _check("rms_norm", x, weight)
    return _rms_norm_triton(x, weight, eps) if x.is_cuda else _rms_norm_cpu(x, weight, eps)


def _add_rms_norm_forward(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    _check("add_rms_norm", x, weight)
    if residual.shape != x.shape or residual.dtype != x.dtype:
        raise ValueError(
            f"add_rms_norm: residual {tuple(residual.shape)} {residual.dtype} does not fit x {tuple(x.shape)} {x.dtype}"
        )
    forward = _add_rms_norm_triton if x.is_cuda else _add_rms_norm_cpu
    return forward(x, residual, weight, eps)


def _row_layout(x: Tensor) -> tuple[Tensor, int, int, int]:
    """(x, outer stride, inner stride, inner count): row r starts at r // count * outer + r % count * inner.

    Without a copy for contiguous x and for [T, N, H] of any outer strides.
    """
    hidden_size = x.shape[-1]
    if x.is_contiguous():
        return x, hidden_size, 0, 1
    if x.dim() == 3 and x.stride(2) == 1:
        return x, x.stride(0), x.stride(1), x.shape[1]
    if x.dim() == 2 and x.stride(1) == 1:
        return x, x.stride(0), 0, 1
    return x.contiguous(), hidden_size, 0, 1


def _flat(x: Tensor) -> np.ndarray:
    """x's memory from its first element to its last: always a contiguous array, so that one compiled kernel, with one
    order of sums, serves every layout."""
    x = x.detach() if x.requires_grad else x
    if x.is_contiguous():
        return x.numpy().reshape(-1)
    span = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.as_strided((span if x.numel() else 0,), (1,)).numpy()


def _min_rows_per_thread(hidden_size: int) -> int:
    return _ELEMENTS_PER_THREAD // max(hidden_size, 1) + 1


def _check(name: str, x: Tensor, weight: Tensor) -> None:
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"{name}: x {tuple(x.shape)} and weight {tuple(weight.shape)} do not fit")
    if not x.is_cuda and not (x.is_cpu and x.dtype is weight.dtype is torch.float32):
        raise ValueError(f"{name} on the CPU takes float32, not {x.dtype} ({x.device}) and {weight.dtype}")


def _rms_norm_cpu(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    hidden_size = x.shape[-1]
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    x, outer, inner, count = _row_layout(x)
    weight = weight.contiguous()
    parallel_rows(
        _rms_norm_rows,
        y.numel() // max(hidden_size, 1),
        _min_rows_per_thread(hidden_size),
        x.data_ptr(), outer, inner, count, address_of(weight), eps, y.data_ptr(), hidden_size,
    )  # fmt: skip
    return y


def _add_rms_norm_cpu(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    hidden_size = x.shape[-1]
    x, residual, weight = x.contiguous(), residual.contiguous(), weight.contiguous()
    y, summed = torch.empty_like(x), torch.empty_like(x)
    parallel_rows(
        _add_rms_norm_rows,
        y.numel() // max(hidden_size, 1),
        _min_rows_per_thread(hidden_size),
        address_of(x), address_of(residual), address_of(weight), eps, summed.data_ptr(), y.data_ptr(), hidden_size,
    )  # fmt: skip
    return y, summed


@inline_njit
def _rstd(row, eps):
    """Sixteen running sums over columns j % 16, written out, so that every kernel here adds in this one order."""
    size = row.shape[0]
    whole = size - size % 16
    s0 = s1 = s2 = s3 = s4 = s5 = s6 = s7 = s8 = s9 = s10 = s11 = s12 = s13 = s14 = s15 = _ZERO
    for j in range(0, whole, 16):
        block = row[j : j + 16]
        s0 = fma32(block[0], block[0], s0)
        s1 = fma32(block[1], block[1], s1)
        s2 = fma32(block[2], block[2], s2)
        s3 = fma32(block[3], block[3], s3)
        s4 = fma32(block[4], block[4], s4)
        s5 = fma32(block[5], block[5], s5)
        s6 = fma32(block[6], block[6], s6)
        s7 = fma32(block[7], block[7], s7)
        s8 = fma32(block[8], block[8], s8)
        s9 = fma32(block[9], block[9], s9)
        s10 = fma32(block[10], block[10], s10)
        s11 = fma32(block[11], block[11], s11)
        s12 = fma32(block[12], block[12], s12)
        s13 = fma32(block[13], block[13], s13)
        s14 = fma32(block[14], block[14], s14)
        s15 = fma32(block[15], block[15], s15)
    rest = _ZERO
    for j in range(whole, size):
        rest = fma32(row[j], row[j], rest)
    low = ((s0 + s4) + (s2 + s6)) + ((s1 + s5) + (s3 + s7))
    high = ((s8 + s12) + (s10 + s14)) + ((s9 + s13) + (s11 + s15))
    mean = (low + high + rest) / np.float32(size)
    return _ONE / np.sqrt(mean + np.float32(eps))


@inline_njit
def rms_norm_row(row, weight, eps, out):
    """One row of `rms_norm`, for the kernels that contain one."""
    rstd = _rstd(row, eps)
    for j in range(row.shape[0]):
        out[j] = weight[j] * (row[j] * rstd)


@exact_njit
def _rms_norm_rows(start, stop, x, outer, inner, count, weight, eps, y, hidden_size):
    scale = row32(weight, 0, hidden_size)
    for r in range(start, stop):
        row = row32(x, r // count * outer + r % count * inner, hidden_size)
        rms_norm_row(row, scale, eps, row32(y, r * hidden_size, hidden_size))


@exact_njit
def _add_rms_norm_rows(start, stop, x, residual, weight, eps, summed, y, hidden_size):
    scale = row32(weight, 0, hidden_size)
    for r in range(start, stop):
        offset = r * hidden_size
        row, other = row32(x, offset, hidden_size), row32(residual, offset, hidden_size)
        total = row32(summed, offset, hidden_size)
        for j in range(hidden_size):
            total[j] = row[j] + other[j]
        rms_norm_row(total, scale, eps, row32(y, offset, hidden_size))


@njit
def _rms_norm_backward_rows(start, stop, x, outer, inner, count, weight, eps, dy, dx, rstds, hidden_size):
    """Adds rstd * (weight * dy) - x * rstd^3 / H * sum(weight * dy * x) to dx."""
    for r in range(start, stop):
        offset = r // count * outer + r % count * inner
        row = x[offset : offset + hidden_size]
        dout = dy[r * hidden_size : (r + 1) * hidden_size]
        drow = dx[r * hidden_size : (r + 1) * hidden_size]
        rstd = _rstd(row, eps)
        rstds[r] = rstd
        dot = _ZERO
        for j in range(hidden_size):
            dot += weight[j] * dout[j] * row[j]
        scale = dot * rstd * rstd * rstd / np.float32(hidden_size)
        for j in range(hidden_size):
            drow[j] += rstd * (weight[j] * dout[j]) - row[j] * scale


@njit
def _rms_norm_weight_grad_columns(start, stop, x, outer, inner, count, dy, rstds, dweight, hidden_size):
    # Threads share columns, not rows: each column is summed over the rows in order, whatever the number of threads.
    sums = np.zeros(stop - start, np.float64)
    for r in range(rstds.shape[0]):
        offset = r // count * outer + r % count * inner
        row = x[offset + start : offset + stop]
        dout = dy[r * hidden_size + start : r * hidden_size + stop]
        rstd = rstds[r]
        for j in range(stop - start):
            sums[j] += dout[j] * (row[j] * rstd)
    for j in range(stop - start):
        dweight[start + j] = sums[j]


def _rms_norm_backward(x: Tensor, weight: Tensor, eps: float, dy: Tensor, dx_start: Tensor | None):
    """(dx_start + gradient by x, gradient by weight); dx_start may be overwritten."""
    if x.is_cuda:
        return _rms_norm_backward_triton(x, weight, eps, dy, dx_start)
    hidden_size = x.shape[-1]
    num_rows = x.numel() // max(hidden_size, 1)
    dx = torch.zeros(x.shape, dtype=torch.float32, device="cpu") if dx_start is None else dx_start.contiguous()
    dweight, rstds = torch.empty(hidden_size, dtype=torch.float32, device="cpu"), np.empty(num_rows, np.float32)
    x, outer, inner, count = _row_layout(x)
    x_flat, dy_flat = _flat(x), _flat(dy.contiguous())
    parallel_rows(
        _rms_norm_backward_rows,
        num_rows,
        _min_rows_per_thread(hidden_size),
        x_flat, outer, inner, count, _flat(weight), eps, dy_flat, _flat(dx), rstds, hidden_size,
    )  # fmt: skip
    parallel_rows(
        _rms_norm_weight_grad_columns,
        hidden_size,
        max(16, _min_rows_per_thread(num_rows)),
        x_flat, outer, inner, count, dy_flat, rstds, _flat(dweight), hidden_size,
    )  # fmt: skip
    return dx, dweight


def _rms_norm_triton(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    x, outer, inner, count = _row_layout(x)
    _launch(x, outer, inner, count, x, weight, eps, y, y, has_residual=False)
    return y


def _add_rms_norm_triton(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    x, residual = x.contiguous(), residual.contiguous()
    y, summed = torch.empty_like(x), torch.empty_like(x)
    _launch(x, x.shape[-1], 0, 1, residual, weight, eps, summed, y, has_residual=True)
    return y, summed


def _launch(x, outer, inner, count, residual, weight, eps, summed, y, has_residual) -> None:
    hidden_size = x.shape[-1]
    if y.numel() == 0:
        return
    block = triton.next_power_of_2(hidden_size)
    rows = max(1, _TILE // block)
    num_rows = y.numel() // hidden_size
    overlap = launches_overlap(x.device)
    _rms_norm_kernel[(triton.cdiv(num_rows, rows),)](
        x, residual, weight, summed, y, outer, inner, count, num_rows, hidden_size, eps,
        HAS_RESIDUAL=has_residual, ROWS=rows, BLOCK=block, OVERLAP=overlap, num_warps=_num_warps(rows * block),
        enable_fp_fusion=False, launch_pdl=overlap,
    )  # fmt: skip


# A program of the kernels below has a tile of about so many elements. Tiles, rows and warps are free.
_TILE = 2048


def _num_warps(tile: int) -> int:
    return min(16, max(4, tile // 512))


@triton.jit
def rstd_of(square_sum, hidden_size, eps):
    """square_sum: [ROWS], tree_sum(x * x) of fp32 x, 0 outside the row -> [ROWS, 1]."""
    return tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(square_sum, hidden_size * 1.0) + eps))[:, None]


@triton.jit
def rms_norm_tile(x, weight, rstd, dtype: tl.constexpr):
    """The normed tile, rounded to dtype, as fp32."""
    return (weight * (x * rstd).to(dtype).to(tl.float32)).to(dtype).to(tl.float32)


@triton.jit
def _rms_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, summed_ptr, y_ptr, outer, inner, count, num_rows, hidden_size, eps,
    HAS_RESIDUAL: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    begin_overlapped(OVERLAP)
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    columns = tl.arange(0, BLOCK)
    weight = tl.load(weight_ptr + columns, mask=columns < hidden_size, other=0.0).to(tl.float32)[None, :]
    columns = columns[None, :]
    mask = (rows < num_rows) & (columns < hidden_size)
    dtype = y_ptr.dtype.element_ty
    x = tl.load(x_ptr + rows // count * outer + rows % count * inner + columns, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + rows * hidden_size + columns, mask=mask, other=0.0).to(tl.float32)
        rounded = (x + residual).to(dtype)
        tl.store(summed_ptr + rows * hidden_size + columns, rounded, mask=mask)
        x = rounded.to(tl.float32)
    y = rms_norm_tile(x, weight, rstd_of(tree_sum(x * x), hidden_size, eps), dtype)
    tl.store(y_ptr + rows * hidden_size + columns, y.to(dtype), mask=mask)


# Enough programs to fill a GPU, few enough that their partial sums of the weight's gradient cost little.
_BACKWARD_PROGRAMS = 264
_BACKWARD_STAGES = 3


def _rms_norm_backward_triton(x: Tensor, weight: Tensor, eps: float, dy: Tensor, dx_start: Tensor | None):
    """dx in one pass over x and dy. The weight's gradient: each program adds its rows in order, then the programs'
    sums are added, so it repeats to the bit."""
    hidden_size = x.shape[-1]
    num_rows = x.numel() // max(hidden_size, 1)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if num_rows == 0:
        return dx, torch.zeros_like(weight)
    x, outer, inner, count = _row_layout(x)
    dy = dy.contiguous()
    dx_start = dy if dx_start is None else dx_start.contiguous()
    block = triton.next_power_of_2(hidden_size)
    rows = max(1, _TILE // block)
    steps = triton.cdiv(triton.cdiv(num_rows, rows), _BACKWARD_PROGRAMS)
    num_programs = triton.cdiv(num_rows, rows * steps)
    partial_sums = torch.empty(num_programs, hidden_size, dtype=torch.float32, device=x.device)
    _rms_norm_backward_kernel[(num_programs,)](
        x, weight, dy, dx_start, dx, partial_sums, outer, inner, count, num_rows, hidden_size, steps, eps,
        HAS_START=dx_start is not dy, ROWS=rows, BLOCK=block, STAGES=_BACKWARD_STAGES,
        num_warps=8, enable_fp_fusion=False,
    )  # fmt: skip
    return dx, partial_sums.sum(0).to(weight.dtype)


@triton.jit
def _rms_norm_backward_kernel(
    x_ptr, weight_ptr, dy_ptr, dx_start_ptr, dx_ptr, partial_sums_ptr, outer, inner, count, num_rows, hidden_size,
    steps, eps, HAS_START: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    columns = tl.arange(0, BLOCK)
    weight = tl.load(weight_ptr + columns, mask=columns < hidden_size, other=0.0).to(tl.float32)[None, :]
    columns = columns[None, :]
    dweight = tl.zeros((ROWS, BLOCK), tl.float32)
    for step in tl.range(steps, num_stages=STAGES):
        rows = ((tl.program_id(0) * steps + step) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        mask = (rows < num_rows) & (columns < hidden_size)
        x = tl.load(x_ptr + rows // count * outer + rows % count * inner + columns, mask=mask, other=0.0)
        dy = tl.load(dy_ptr + rows * hidden_size + columns, mask=mask, other=0.0).to(tl.float32)
        x = x.to(tl.float32)
        rstd = rstd_of(tree_sum(x * x), hidden_size, eps)
        x_hat = x * rstd
        weighted = weight * dy
        mean = tree_sum(weighted * x_hat) / hidden_size
        dx = rstd * (weighted - x_hat * mean[:, None])
        if HAS_START:
            dx += tl.load(dx_start_ptr + rows * hidden_size + columns, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + rows * hidden_size + columns, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        dweight += dy * x_hat
    partial_sum = tl.sum(dweight, axis=0)[None, :]
    tl.store(partial_sums_ptr + tl.program_id(0) * hidden_size + columns, partial_sum, mask=columns < hidden_size)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return _rms_norm_forward(x, weight, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        dx, dweight = _rms_norm_backward(x, weight, ctx.eps, dy, None)
        return dx, dweight, None


class _AddRmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, weight, eps):
        normed, summed = _add_rms_norm_forward(x, residual, weight, eps)
        ctx.save_for_backward(summed, weight)
        ctx.eps = eps
        return normed, summed

    @staticmethod
    @once_differentiable
    def backward(ctx, dnormed, dsummed):
        summed, weight = ctx.saved_tensors
        # autograd may still hold dsummed for others, and the CPU's kernel adds in place
        dx_start = dsummed if dsummed.is_cuda else dsummed.clone()
        dx, dweight = _rms_norm_backward(summed, weight, ctx.eps, dnormed, dx_start)
        return dx, dx, dweight, None
