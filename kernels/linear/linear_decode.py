"""The matrix product of a few rows on a Hopper GPU, as fast as the weight streams in."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from lockstep.kernels.linear.silu_mul import silu_mul_tile

MAX_ROWS = 64

_NUM_SMS = 132


def can_decode(x: Tensor, weight: Tensor, max_rows: int) -> bool:
    """Whether `linear_decode` takes these, with the bits of cuBLASLt: measured for bf16 and whole tiles on Hopper."""
    return (
        0 < x.numel() <= max_rows * x.shape[-1]
        and x.dtype == weight.dtype == torch.bfloat16
        and weight.shape[0] % 64 == 0
        and weight.shape[1] % 64 == 0
        and weight.stride(1) == 1
        and weight.stride(0) % 8 == 0
        and weight.data_ptr() % 16 == 0
        and torch.cuda.get_device_capability(x.device)[0] == 9
    )


def linear_decode(x: Tensor, weight: Tensor, silu_mul: bool = False) -> Tensor:
    """x[..., K] of at most 64 rows, weight[N, K] -> [..., N], or [..., N/2] with `silu_mul` of the product's halves.

    Each program streams a tile of the weight's rows through shared memory; it is wgmma's tall operand, x its narrow
    one. Adds K in order into one fp32 accumulator. `silu_mul` rounds the product first, as two calls would.
    """
    x_MK = x.reshape(-1, x.shape[-1])
    if x_MK.stride(1) != 1 or x_MK.stride(0) * x.element_size() % 16 or x_MK.data_ptr() % 16:
        x_MK = x_MK.clone(memory_format=torch.contiguous_format)
    (m, k), n = x_MK.shape, weight.shape[0]
    assert m <= MAX_ROWS
    block_m, block_n, block_k, num_stages = _tile(m, n)
    grid = (triton.cdiv(n, block_n),)
    row = weight.stride(0)
    if silu_mul:
        n //= 2
        weight_tiles = TensorDescriptor(weight, [2, n, k], [n * row, row, 1], [2, block_n // 2, block_k])
    else:
        weight_tiles = TensorDescriptor(weight, [n, k], [row, 1], [block_n, block_k])
    x_tiles = TensorDescriptor(x_MK, [m, k], [x_MK.stride(0), 1], [block_m, block_k])
    y = torch.empty(m, n, dtype=x.dtype, device=x.device)
    _linear_decode_kernel[grid](
        x_tiles, weight_tiles, y, m, n, k,
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, SILU_MUL=silu_mul, OVERLAP=x.is_cuda,
        num_warps=4, num_stages=num_stages, enable_fp_fusion=False, launch_pdl=x.is_cuda,
    )  # fmt: skip
    return y.view(*x.shape[:-1], n)


def _tile(m: int, n: int) -> tuple[int, int, int, int]:
    """(rows of x, rows of the weight, K tile, pipeline stages), the best of many tried on an H200; none changes bits.

    Up to 32 rows of x: one program per SM whose loads in flight fill shared memory, or three programs that share it.
    """
    if m > 32:
        return (64, 128, 128, 3) if n > 128 * _NUM_SMS else (64, 64, 128, 4)
    block_m, num_stages = (16, 5) if m <= 16 else (32, 4)
    return (block_m, 64, 256, num_stages) if n <= 64 * _NUM_SMS else (block_m, 64, 128, 3)


@triton.jit(do_not_specialize=["M"])
def _linear_decode_kernel(
    x_tiles, weight_tiles, y_ptr, M, N, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SILU_MUL: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """N: columns of y. With SILU_MUL half of a program's weight rows are gate rows and half are their up rows."""
    # Consecutive launches overlap: no program may touch what an earlier kernel writes or reads before this wait.
    if OVERLAP:
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
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    y = accumulator.to(y_ptr.dtype.element_ty)
    if SILU_MUL:
        gate, up = y.reshape(2, COLUMNS, BLOCK_M).permute(1, 2, 0).split()
        y = silu_mul_tile(gate, up)
    rows = tl.arange(0, BLOCK_M)
    columns = column + tl.arange(0, COLUMNS)
    tl.store(y_ptr + rows[None, :] * N + columns[:, None], y, mask=(rows < M)[None, :] & (columns < N)[:, None])
