"""The sum of a tensor's squares as an integer, which no order of the additions can change."""

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from lockstep.kernels._cpu import exact_njit

DIGIT_BITS = 26  # 2^37 digits of so many bits add up in an int64 without overflow
_DIGIT = 2.0**DIGIT_BITS
_CHUNK_ELEMENTS = 1 << 22
_BLOCK = 4096


def square_sum(x: Tensor, exponent: int) -> Tensor:
    """x of any shape in fp32 or less, |x| <= 2^exponent -> int64 [2], the high and the low digits' sums.

        square = floor((x / 2^exponent)^2 * 2^52)                 exact but for the floor: an fp32 squared has 48 bits
        high, low = sum of square // 2^26, sum of square % 2^26

    The sum of the squares is 2^(2 * exponent) * (high * 2^26 + low) / 2^52. Not differentiable.
    """
    x = x.detach().reshape(-1)
    return _square_sum_triton(x, exponent) if x.is_cuda else _square_sum_cpu(x, exponent)


def square_sum_reference(x: Tensor, exponent: int) -> Tensor:
    """The formula of `square_sum` in plain torch, in chunks that bound its memory."""
    sums = torch.zeros(2, dtype=torch.int64, device=x.device)
    for part in x.reshape(-1).split(_CHUNK_ELEMENTS):
        square = part.double().mul_(2.0**-exponent).square_().mul_(2.0**DIGIT_BITS)
        high = square.floor()
        low = square.sub_(high).mul_(2.0**DIGIT_BITS).floor_()
        sums += torch.stack((high.to(torch.int64).sum(), low.to(torch.int64).sum()))
    return sums


def _square_sum_cpu(x: Tensor, exponent: int) -> Tensor:
    sums = torch.zeros(2, dtype=torch.int64, device="cpu")
    _add_squares(x.float().numpy(), 2.0**-exponent, sums.numpy())
    return sums


@exact_njit
def _add_squares(x, factor, sums):
    high_sum, low_sum = np.int64(0), np.int64(0)
    for i in range(x.size):
        scaled = np.float64(x[i]) * factor
        square = scaled * scaled * _DIGIT
        high = np.floor(square)
        high_sum += np.int64(high)
        low_sum += np.int64((square - high) * _DIGIT)
    sums[0], sums[1] = high_sum, low_sum


def _square_sum_triton(x: Tensor, exponent: int) -> Tensor:
    sums = torch.zeros(2, dtype=torch.int64, device=x.device)
    if x.numel():
        # As a tensor: a kernel's float argument is an fp32, which 2^148 is not.
        factor = torch.full((), 2.0**-exponent, dtype=torch.float64, device=x.device)
        _square_sum_kernel[(triton.cdiv(x.numel(), _BLOCK),)](x, factor, sums, x.numel(), DIGIT_BITS, BLOCK=_BLOCK)
    return sums


@triton.jit
def _square_sum_kernel(x_ptr, factor_ptr, sums_ptr, N, DIGIT_BITS: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets, mask=offsets < N, other=0.0).to(tl.float64) * tl.load(factor_ptr)
    square = x * x * (1 << DIGIT_BITS)
    high = square.to(tl.int64)  # truncation is floor, since squares are not negative
    low = ((square - high.to(tl.float64)) * (1 << DIGIT_BITS)).to(tl.int64)
    # Atomics of integers: their order does not matter.
    tl.atomic_add(sums_ptr, tl.sum(high), sem="relaxed")
    tl.atomic_add(sums_ptr + 1, tl.sum(low), sem="relaxed")
