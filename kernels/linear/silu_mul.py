"""SwiGLU's activation."""

import numpy as np
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from lockstep.kernels._cpu import address_of, exact_njit, exp32, parallel_rows, row32
from lockstep.kernels._triton import begin_overlapped, launches_overlap

_ELEMENTS_PER_THREAD = 32768
_ONE = np.float32(1.0)


def silu_mul(gate_up: Tensor) -> Tensor:
    """gate_up[..., 2F] -> [..., F] of the same dtype.

        gate, up = gate_up[..., :F], gate_up[..., F:]
        y = round(round(gate / (1 + exp(-gate))) * up)        computed in fp32

    Differentiable. On the CPU only float32. Raises ValueError for an odd last dimension.
    """
    if gate_up.shape[-1] % 2:
        raise ValueError(f"silu_mul: the last dimension must be even (gate and up), got {tuple(gate_up.shape)}")
    if torch.is_grad_enabled() and gate_up.requires_grad:
        return _SiluMul.apply(gate_up)
    return _silu_mul_forward(gate_up)


def silu_mul_reference(gate_up: Tensor) -> Tensor:
    """The formula of `silu_mul` in plain torch, in any dtype."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def _silu_mul_forward(gate_up: Tensor) -> Tensor:
    return _silu_mul_triton(gate_up) if gate_up.is_cuda else _silu_mul_cpu(gate_up)


def _silu_mul_cpu(gate_up: Tensor) -> Tensor:
    if gate_up.dtype != torch.float32:
        raise ValueError(f"silu_mul on the CPU takes float32, not {gate_up.dtype}")
    gate_up = gate_up.contiguous()
    *outer_shape, num_columns = gate_up.shape
    num_columns //= 2
    y = torch.empty(*outer_shape, num_columns, dtype=torch.float32, device="cpu")
    parallel_rows(
        _silu_mul_rows,
        y.numel() // max(num_columns, 1),
        _ELEMENTS_PER_THREAD // max(num_columns, 1) + 1,
        address_of(gate_up),
        y.data_ptr(),
        num_columns,
    )
    return y


@exact_njit
def _silu_mul_rows(start, stop, gate_up, y, num_columns):
    for row in range(start, stop):
        gate = row32(gate_up, 2 * row * num_columns, num_columns)
        up = row32(gate_up, (2 * row + 1) * num_columns, num_columns)
        out = row32(y, row * num_columns, num_columns)
        for j in range(num_columns):
            out[j] = gate[j] / (_ONE + exp32(-gate[j])) * up[j]


@exact_njit
def _silu_mul_backward_rows(start, stop, gate_up, dy, dgate_up, y, num_columns):
    for row in range(start, stop):
        gate = gate_up[2 * row * num_columns : (2 * row + 1) * num_columns]
        up = gate_up[(2 * row + 1) * num_columns : (2 * row + 2) * num_columns]
        dgate = dgate_up[2 * row * num_columns : (2 * row + 1) * num_columns]
        dup = dgate_up[(2 * row + 1) * num_columns : (2 * row + 2) * num_columns]
        dout = dy[row * num_columns : (row + 1) * num_columns]
        out = y[row * num_columns : (row + 1) * num_columns]
        for j in range(num_columns):
            divisor = _ONE + exp32(-gate[j])
            sigmoid = _ONE / divisor
            out[j] = gate[j] / divisor * up[j]
            dup[j] = dout[j] * (gate[j] * sigmoid)
            dgate[j] = dout[j] * up[j] * (sigmoid * (_ONE + gate[j] * (_ONE - sigmoid)))


def _silu_mul_triton(gate_up: Tensor) -> Tensor:
    gate_up = gate_up.contiguous()
    num_columns = gate_up.shape[-1] // 2
    y = torch.empty(*gate_up.shape[:-1], num_columns, dtype=gate_up.dtype, device=gate_up.device)
    if y.numel():
        block = min(1024, triton.next_power_of_2(num_columns))
        grid = (y.numel() // num_columns, triton.cdiv(num_columns, block))
        overlap = launches_overlap(gate_up.device)
        _silu_mul_kernel[grid](
            gate_up, y, num_columns, BLOCK=block, OVERLAP=overlap, num_warps=4, enable_fp_fusion=False,
            launch_pdl=overlap,
        )  # fmt: skip
    return y


@triton.jit
def _silu_mul_kernel(gate_up_ptr, y_ptr, num_columns, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    begin_overlapped(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < num_columns
    gate_ptr = gate_up_ptr + 2 * row * num_columns
    gate = tl.load(gate_ptr + columns, mask=mask, other=0.0)
    up = tl.load(gate_ptr + num_columns + columns, mask=mask, other=0.0)
    tl.store(y_ptr + row * num_columns + columns, silu_mul_tile(gate, up), mask=mask)


@triton.jit
def silu_mul_tile(gate, up):
    """The formula of `silu_mul` for other kernels, which must be compiled with enable_fp_fusion=False too."""
    gate32 = gate.to(tl.float32)
    activated = (gate32 / (1.0 + tl.exp(-gate32))).to(gate.dtype)
    return (activated.to(tl.float32) * up.to(tl.float32)).to(gate.dtype)


def _silu_mul_backward_triton(gate_up: Tensor, dy: Tensor) -> Tensor:
    gate_up, dy = gate_up.contiguous(), dy.contiguous()
    num_columns = dy.shape[-1]
    dgate_up = torch.empty_like(gate_up)
    if dy.numel():
        block = min(1024, triton.next_power_of_2(num_columns))
        grid = (dy.numel() // num_columns, triton.cdiv(num_columns, block))
        _silu_mul_backward_kernel[grid](gate_up, dy, dgate_up, num_columns, BLOCK=block, num_warps=4)
    return dgate_up


@triton.jit
def _silu_mul_backward_kernel(gate_up_ptr, dy_ptr, dgate_up_ptr, num_columns, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < num_columns
    gate_offset, up_offset = 2 * row * num_columns + columns, (2 * row + 1) * num_columns + columns
    gate = tl.load(gate_up_ptr + gate_offset, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + up_offset, mask=mask, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + row * num_columns + columns, mask=mask, other=0.0).to(tl.float32)
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    dgate = dy * up * (sigmoid * (1.0 + gate * (1.0 - sigmoid)))
    dtype = dgate_up_ptr.dtype.element_ty
    tl.store(dgate_up_ptr + gate_offset, dgate.to(dtype), mask=mask)
    tl.store(dgate_up_ptr + up_offset, (dy * (gate * sigmoid)).to(dtype), mask=mask)


def silu_mul_backward(gate_up: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of gate_up, and silu_mul(gate_up) once more, to the bit."""
    if gate_up.is_cuda:
        return _silu_mul_backward_triton(gate_up, dy), _silu_mul_triton(gate_up)
    return _silu_mul_backward_cpu(gate_up, dy)


def _silu_mul_backward_cpu(gate_up: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    gate_up, dy = gate_up.contiguous(), dy.contiguous()
    num_columns = dy.shape[-1]
    dgate_up, y = torch.empty_like(gate_up), torch.empty_like(dy)
    parallel_rows(
        _silu_mul_backward_rows,
        dy.numel() // max(num_columns, 1),
        _ELEMENTS_PER_THREAD // max(num_columns, 1) + 1,
        *(x.detach().numpy().reshape(-1) for x in (gate_up, dy, dgate_up, y)),
        num_columns,
    )
    return dgate_up, y


class _SiluMul(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up):
        ctx.save_for_backward(gate_up)
        return _silu_mul_forward(gate_up)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        (gate_up,) = ctx.saved_tensors
        return _silu_mul_backward_triton(gate_up, dy) if dy.is_cuda else _silu_mul_backward_cpu(gate_up, dy)[0]
