"""The matrix product of a few rows on a Hopper GPU: how fast depends only on how fast the weight streams in."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from lockstep.kernels.silu_mul import silu_mul_tile

MAX_ROWS = 16

_NUM_SMS = 132
_BLOCK_M = 16
# The least height of a wgmma tile.
_BLOCK_N = 64


def can_decode(x: Tensor, weight: Tensor) -> bool:
    """Whether `linear_decode` takes these, with the bits of cuBLASLt: measured for bf16 and whole tiles on Hopper."""
    return (
        0 < x.numel() <= MAX_ROWS * x.shape[-1]
        and x.dtype == weight.dtype == torch.bfloat16
        and weight.shape[0] % _BLOCK_N == 0
        and weight.shape[1] % 64 == 0
        and weight.is_contiguous()
        and weight.data_ptr() % 16 == 0
        and torch.cuda.get_device_capability(x.device)[0] == 9
    )


def linear_decode(x: Tensor, weight: Tensor, silu_mul: bool = False) -> Tensor:
    """x[..., K] of at most 16 rows, weight[N, K] -> [..., N], or [..., N/2] with `silu_mul` of the product's halves.

    Each program streams 64 rows of the weight through shared memory; they are wgmma's tall operand, x its narrow one.
    Adds K in order into one fp32 accumulator. `silu_mul` rounds the product first, as two calls would.
    """
    x_MK = x.reshape(-1, x.shape[-1])
    if x_MK.stride(1) != 1 or x_MK.stride(0) * x.element_size() % 16 or x_MK.data_ptr() % 16:
        x_MK = x_MK.clone(memory_format=torch.contiguous_format)
    (m, k), n = x_MK.shape, weight.shape[0]
    num_tiles = triton.cdiv(n, _BLOCK_N)
    # Loads in flight fill shared memory: all of it for one program per SM, else a half or a third.
    block_k, num_stages = (256, 5) if num_tiles <= _NUM_SMS else (128, 4)
    if silu_mul:
        n //= 2
        weight_tiles = TensorDescriptor(weight, [2, n, k], [n * k, k, 1], [2, _BLOCK_N // 2, block_k])
    else:
        weight_tiles = TensorDescriptor(weight, [n, k], [k, 1], [_BLOCK_N, block_k])
    x_tiles = TensorDescriptor(x_MK, [m, k], [x_MK.stride(0), 1], [_BLOCK_M, block_k])
    y = torch.empty(m, n, dtype=x.dtype, device=x.device)
    _linear_decode_kernel[(num_tiles,)](
        x_tiles, weight_tiles, y, m, n, k,
        BLOCK_M=_BLOCK_M, BLOCK_N=_BLOCK_N, BLOCK_K=block_k, SILU_MUL=silu_mul, OVERLAP=x.is_cuda,
        num_warps=4, num_stages=num_stages, enable_fp_fusion=False, launch_pdl=x.is_cuda,
    )  # fmt: skip
    return y.view(*x.shape[:-1], n)


@triton.jit(do_not_specialize=["M"])
def _linear_decode_kernel(
    x_tiles, weight_tiles, y_ptr, M, N, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SILU_MUL: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """N: columns of y. With SILU_MUL half of a program's weight rows are gate rows and half are their up rows."""
    if OVERLAP:
        # The launch overlaps the previous kernel's end; this waits for what that kernel wrote.
        tl.extra.cuda.gdc_wait()
    COLUMNS: tl.constexpr = BLOCK_N // 2 if SILU_MUL else BLOCK_N
    column = tl.program_id(0) * COLUMNS
    accumulator = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for k in range(0, K, BLOCK_K):
        if SILU_MUL:
            weight = weight_tiles.load([0, column, k]).reshape(BLOCK_N, BLOCK_K)
        else:
            weight = weight_tiles.load([column, k])
        accumulator = tl.dot(weight, x_tiles.load([0, k]).T, accumulator, input_precision="ieee")
    y = accumulator.to(y_ptr.dtype.element_ty)
    if SILU_MUL:
        gate, up = y.reshape(2, COLUMNS, BLOCK_M).permute(1, 2, 0).split()
        y = silu_mul_tile(gate, up)
    rows = tl.arange(0, BLOCK_M)
    columns = column + tl.arange(0, COLUMNS)
    tl.store(y_ptr + rows[None, :] * N + columns[:, None], y, mask=(rows < M)[None, :] & (columns < N)[:, None])
