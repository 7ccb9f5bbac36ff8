"""Matrix product with a weight, where a row's bits depend on that row and the weight alone."""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from lockstep.kernels.linear.linear_decode import can_decode, linear_decode

# MKL without its strict mode takes another path, with another order of sums, for other numbers of rows.
_CPU_ROW_MULTIPLE = 16
# So many rows are not copied to be padded: the last ones are multiplied alone.
_CPU_MANY_ROWS = 512
# And so it does where it deals few columns and few rows out to threads: seen on 2 to 16 threads of an EPYC for fewer
# than 12 columns a thread, unless there are as many rows as columns and 4 a thread.
_CPU_COLUMNS_PER_THREAD, _CPU_ROWS_PER_THREAD = 12, 4

# Up to so many rows a Triton kernel that only streams the weight wins over cuBLASLt's ...
_DECODE_MAX_ROWS = 16
# ... and up to so many any does outside a graph, by its smaller launch cost (cuBLASLt's: 75 us).
_TRITON_MAX_ROWS = 256
# The K tile is part of the meaning of the bits and must not be tuned per shape; the others are free.
_BLOCK_K = 64
_GROUP_M = 8


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x[..., K], weight[N, K], bias[N] | None -> [..., N] of x's dtype.

        y[..., n] = round(sum over k of x[..., k] * weight[n, k])        accumulated in fp32
        y[..., n] = round(y[..., n] + bias[n])                            if there is a bias

    The bias is added to the rounded product, so it cannot change the order of the sum. Differentiable in all three.
    On the CPU only float32 (other dtypes raise ValueError).

    Rows are independent in a process that imported lockstep.kernels (on a GPU: that called `numerics.set_up`) before
    its first matrix product.
    """
    if torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        return _Linear.apply(x, weight, bias)
    return _linear_forward(x, weight, bias)


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The formula of `linear` in plain torch, in any dtype."""
    y = x @ weight.t()
    return y if bias is None else y + bias


def _linear_forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if x.is_cuda:
        return _linear_cuda(x, weight, bias)
    return _linear_cpu(x, weight, bias)


def _linear_cpu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if x.dtype != torch.float32:
        raise ValueError(f"linear on the CPU takes float32, not {x.dtype}")
    # torch turns some strided batches into bmm, which has other bits: always hand it two dimensions.
    x_MK = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    num_rows, num_columns = x_MK.shape[0], weight.shape[0]
    num_last = num_rows % _CPU_ROW_MULTIPLE
    num_padded = padded_rows(num_rows, num_columns)
    if num_padded == num_rows:
        y = F.linear(x_MK, weight)
    elif num_rows < _CPU_MANY_ROWS or num_padded - num_rows >= _CPU_ROW_MULTIPLE:
        y = F.linear(F.pad(x_MK, (0, 0, 0, num_padded - num_rows)), weight)[:num_rows]
    else:
        y = torch.empty(num_rows, num_columns, dtype=torch.float32, device="cpu")
        torch.mm(x_MK[:-num_last], weight.t(), out=y[:-num_last])
        last = F.pad(x_MK[-num_last:], (0, 0, 0, padded_rows(num_last, num_columns) - num_last))
        y[-num_last:] = F.linear(last, weight)[:num_last]
    if bias is not None:
        y.add_(bias)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], weight.shape[0])


def padded_rows(num_rows: int, num_columns: int) -> int:
    """Of how many rows a product on the CPU with a weight of num_columns columns is made, for their bits to be those of
    many rows: so many at least, and a multiple of 16."""
    threads = torch.get_num_threads()
    if num_rows and num_columns < _CPU_COLUMNS_PER_THREAD * threads:
        num_rows = max(num_rows, num_columns, _CPU_ROWS_PER_THREAD * threads)
    return num_rows + -num_rows % _CPU_ROW_MULTIPLE


def _linear_cuda(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The fastest of three for the number of rows. All add K in order into one fp32 accumulator (cuBLASLt does without
    split-K) and have the same bits: measured for bf16 and whole tiles of K and N; all else is `_linear_triton`'s."""
    num_rows = x.numel() // x.shape[-1]
    same_bits = x.dtype == torch.bfloat16 and weight.shape[0] % 64 == 0 and weight.shape[1] % _BLOCK_K == 0
    if can_decode(x, weight, _DECODE_MAX_ROWS):
        y = linear_decode(x, weight)
    elif not same_bits or (num_rows <= _TRITON_MAX_ROWS and not torch.cuda.is_current_stream_capturing()):
        y = _linear_triton(x, weight)
    else:
        y = F.linear(x.reshape(-1, x.shape[-1]), weight).view(*x.shape[:-1], weight.shape[0])
    return y if bias is None else y.add_(bias)


def _linear_triton(x: Tensor, weight: Tensor) -> Tensor:
    x_MK = x.reshape(-1, x.shape[-1])
    if x_MK.stride(1) != 1:
        x_MK = x_MK.contiguous()
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    (m, k), n = x_MK.shape, weight.shape[0]
    y = torch.empty(m, n, dtype=x.dtype, device=x.device)
    if m and n:
        block_m = 16 if m <= 16 else 64
        block_n = 64 if m <= 64 else 128
        grid = (triton.cdiv(m, block_m) * triton.cdiv(n, block_n),)
        _linear_kernel[grid](
            x_MK, weight, y, m, n, k, x_MK.stride(0), weight.stride(0),
            BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=_BLOCK_K, GROUP_M=_GROUP_M, num_warps=4, num_stages=4,
        )  # fmt: skip
    return y.view(*x.shape[:-1], n)


@triton.jit
def _linear_kernel(
    x_ptr, weight_ptr, y_ptr, M, N, K, stride_x, stride_weight,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    # Programs that run together share rows of x and of the weight in the L2 cache: GROUP_M row tiles per column tile.
    pid = tl.program_id(0)
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    group = pid // (GROUP_M * tiles_n)
    group_size = min(tiles_m - group * GROUP_M, GROUP_M)
    pid_m = group * GROUP_M + (pid % (GROUP_M * tiles_n)) % group_size
    pid_n = (pid % (GROUP_M * tiles_n)) // group_size

    rows = (pid_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    columns = (pid_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        ks = start + tl.arange(0, BLOCK_K)
        x = tl.load(
            x_ptr + rows[:, None] * stride_x + ks[None, :], mask=(rows < M)[:, None] & (ks < K)[None, :], other=0.0
        )
        weight = tl.load(
            weight_ptr + columns[None, :] * stride_weight + ks[:, None],
            mask=(columns < N)[None, :] & (ks < K)[:, None],
            other=0.0,
        )
        accumulator = tl.dot(x, weight, accumulator, input_precision="ieee")
    tl.store(
        y_ptr + rows[:, None] * N + columns[None, :],
        accumulator.to(y_ptr.dtype.element_ty),
        mask=(rows < M)[:, None] & (columns < N)[None, :],
    )


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return _linear_forward(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        dx, dweight = product_gradients(*ctx.saved_tensors, dy, needs_x, needs_weight)
        return dx, dweight, dy.reshape(-1, dy.shape[-1]).sum(0) if needs_bias else None


def product_gradients(
    x: Tensor, weight: Tensor, dy: Tensor, needs_x: bool, needs_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """(dx, dweight) of the product of x[..., K] and weight[N, K] from dy[..., N]; None for what is not needed."""
    dy_MN = dy.reshape(-1, dy.shape[-1])
    dx = (dy_MN @ weight).view(x.shape) if needs_x else None
    dweight = dy_MN.t() @ x.reshape(-1, x.shape[-1]) if needs_weight else None
    return dx, dweight
