"""Rotary position embedding: frequencies, the table of cosines and sines, and the rotation."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from lockstep.kernels._cpu import address_of, exact_njit, inline_njit, parallel_rows, row32, row64

_ELEMENTS_PER_THREAD = 32768


def rope_inv_freq(
    head_dim: int, theta: float, scaling: Mapping[str, Any] | None, max_position_embeddings: int
) -> tuple[Tensor, float]:
    """(inv_freq fp32[head_dim / 2], attention_factor), with the bits of transformers' ROPE_INIT_FUNCTIONS.

    scaling: transformers' `rope_parameters` (or older `rope_scaling`) dictionary, or None. Its `rope_type` is default,
    linear, llama3 or yarn; any other raises ValueError that names it, as does a missing parameter. theta is not read
    from it. max_position_embeddings serves yarn without a `factor`.
    """
    scaling = scaling or {}
    rope_type = scaling.get("rope_type", scaling.get("type", "default"))
    if rope_type not in _ROPE_TYPES:
        raise ValueError(f"unknown rope_type {rope_type!r}; known: {', '.join(_ROPE_TYPES)}")
    if scaling.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise ValueError("partial_rotary_factor other than 1 is not supported")
    try:
        return _ROPE_TYPES[rope_type](head_dim, theta, scaling, max_position_embeddings)
    except KeyError as error:
        raise ValueError(f"rope_type {rope_type!r} needs the parameter {error.args[0]!r}") from error


def _default(head_dim, theta, scaling, max_position_embeddings):
    return 1.0 / (theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim)), 1.0


def _linear(head_dim, theta, scaling, max_position_embeddings):
    inv_freq, attention_factor = _default(head_dim, theta, scaling, max_position_embeddings)
    return inv_freq / scaling["factor"], attention_factor


def _llama3(head_dim, theta, scaling, max_position_embeddings):
    """Llama 3.1: long waves are slowed by `factor`, short ones kept, those between interpolated."""
    inv_freq, attention_factor = _default(head_dim, theta, scaling, max_position_embeddings)
    factor, low, high = scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"]
    original = scaling["original_max_position_embeddings"]
    wavelength = 2 * math.pi / inv_freq
    is_long, is_short = wavelength > original / low, wavelength < original / high
    scaled = torch.where(is_long, inv_freq / factor, inv_freq)
    smooth = (original / wavelength - low) / (high - low)
    between = (1 - smooth) * scaled / factor + smooth * scaled
    return torch.where(~is_short & ~is_long, between, scaled), attention_factor


def _yarn(head_dim, theta, scaling, max_position_embeddings):
    """YaRN (arXiv:2309.00071): a ramp over the dimensions from extrapolation to interpolation."""
    original = scaling["original_max_position_embeddings"]
    factor = scaling.get("factor")
    if factor is None:
        factor = max_position_embeddings / original
    attention_factor = scaling.get("attention_factor")
    if attention_factor is None:
        mscale, mscale_all_dim = scaling.get("mscale"), scaling.get("mscale_all_dim")
        if mscale and mscale_all_dim:
            attention_factor = _yarn_mscale(factor, mscale) / _yarn_mscale(factor, mscale_all_dim)
        else:
            attention_factor = _yarn_mscale(factor, 1.0)

    def dimension_of(num_rotations):
        return head_dim * math.log(original / (num_rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension_of(scaling.get("beta_fast") or 32), dimension_of(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # as transformers: the ramp must not divide by zero
    ramp = torch.clamp((torch.arange(head_dim // 2, dtype=torch.float32, device="cpu") - low) / (high - low), 0, 1)
    pos_freqs = theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64, device="cpu").to(torch.float32) / head_dim)
    kept = 1 - ramp
    inv_freq = 1.0 / (factor * pos_freqs) * (1 - kept) + 1.0 / pos_freqs * kept
    return inv_freq, float(attention_factor)


def _yarn_mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


_ROPE_TYPES: dict[str, Callable[..., tuple[Tensor, float]]] = {
    "default": _default,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
}


def rope_cos_sin(inv_freq: Tensor, attention_factor: float, num_positions: int) -> Tensor:
    """inv_freq fp32[D/2] -> fp32[num_positions, D] on inv_freq's device: cosines, then sines.

        angle = fp32(position * inv_freq)
        table[position] = fp32(cos(angle) * attention_factor) | fp32(sin(angle) * attention_factor)      in fp64

    Made on the CPU one entry at a time, so that an entry depends on its position and frequency alone, not on the
    table's length or the device.
    """
    inv_freq_cpu = inv_freq.detach().to("cpu", torch.float32).contiguous()
    half = inv_freq_cpu.shape[0]
    table = torch.empty(num_positions, 2 * half, dtype=torch.float32, device="cpu")
    parallel_rows(
        _cos_sin_rows, num_positions, 4096 // max(half, 1) + 1, inv_freq_cpu.numpy(), attention_factor, table.numpy()
    )
    return table.to(inv_freq.device)


@exact_njit
def _cos_sin_rows(start, stop, inv_freq, attention_factor, table):
    half = inv_freq.shape[0]
    for position in range(start, stop):
        for j in range(half):
            angle = np.float64(np.float32(position) * inv_freq[j])
            table[position, j] = np.float32(math.cos(angle) * attention_factor)
            table[position, half + j] = np.float32(math.sin(angle) * attention_factor)


def apply_rope(x: Tensor, cos_sin: Tensor, positions: Tensor) -> Tensor:
    """x[T, N, D], cos_sin fp32[P, D] (from rope_cos_sin), positions[T] int64 -> new contiguous [T, N, D] of x's dtype.

        first, second = x[..., :D/2], x[..., D/2:]
        cos, sin = halves of cos_sin[positions]
        y = round(first * cos - second * sin) | round(second * cos + first * sin)        in fp32

    x may be strided in T and N (a slice of a fused projection). Differentiable in x: the gradient is the rotation by
    the negative angle. Shapes that do not fit raise ValueError. On the CPU only float32 (else ValueError), and a
    position outside [0, P) raises IndexError.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        return _ApplyRope.apply(x, cos_sin, positions)
    return _rotate(x, cos_sin, positions, 1.0)


def deinterleave(x: Tensor) -> Tensor:
    """x[..., D] -> [..., D]: the first elements of the pairs (x0, x1), (x2, x3), ..., then the second ones.

    What `apply_rope` takes, from the layout in which DeepSeek's models hold what they rotate.
    """
    return x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)


def apply_rope_reference(x: Tensor, cos_sin: Tensor, positions: Tensor) -> Tensor:
    """The formula of `apply_rope` in plain torch; at least fp32, fp64 stays fp64."""
    wide = torch.promote_types(x.dtype, torch.float32)
    first, second = x.to(wide).chunk(2, dim=-1)
    cos, sin = cos_sin[positions].to(wide).unsqueeze(1).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def _rotate(x: Tensor, cos_sin: Tensor, positions: Tensor, direction: float) -> Tensor:
    if cos_sin.shape[1] != x.shape[2] or positions.shape[0] != x.shape[0]:
        raise ValueError(
            f"apply_rope: x {tuple(x.shape)}, cos_sin {tuple(cos_sin.shape)} and positions {tuple(positions.shape)} "
            "do not fit"
        )
    return (_apply_rope_triton if x.is_cuda else _apply_rope_cpu)(x, cos_sin, positions, direction)


def _apply_rope_cpu(x: Tensor, cos_sin: Tensor, positions: Tensor, direction: float = 1.0) -> Tensor:
    if not (x.is_cpu and x.dtype is cos_sin.dtype is torch.float32):
        raise ValueError(f"apply_rope on the CPU takes float32, not {x.dtype} ({x.device}) and {cos_sin.dtype}")
    num_tokens, num_heads, head_dim = x.shape
    if x.stride(2) != 1:
        x = x.contiguous()
    cos_sin, positions = cos_sin.contiguous(), positions.contiguous()
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    parallel_rows(
        _apply_rope_tokens,
        num_tokens,
        _ELEMENTS_PER_THREAD // max(num_heads * head_dim, 1) + 1,
        x.data_ptr(), x.stride(0), x.stride(1), address_of(cos_sin), cos_sin.shape[0],
        address_of(positions, torch.int64), y.data_ptr(), num_heads, head_dim, direction,
    )  # fmt: skip
    return y


@inline_njit
def cos_sin_row(cos_sin, num_positions, position, head_dim):
    """The table's row for a position, which is checked."""
    if position < 0 or position >= num_positions:
        raise IndexError("apply_rope: a position lies outside the table of cosines and sines")
    return row32(cos_sin, position * head_dim, head_dim)


@inline_njit
def rotate_row(row, cos_sin, direction, out):
    """One head of one token of `apply_rope`, for the kernels that contain one; `out` is not `row`."""
    # Two loops, because LLVM leaves short heads scalar where a loop has two outputs: three times as slow at D = 32.
    half = row.shape[0] // 2
    first, second, cos, sin = row[:half], row[half:], cos_sin[:half], cos_sin[half:]
    out_first, out_second = out[:half], out[half:]
    for j in range(half):
        out_first[j] = first[j] * cos[j] - second[j] * (direction * sin[j])
    for j in range(half):
        out_second[j] = second[j] * cos[j] + first[j] * (direction * sin[j])


@exact_njit
def _apply_rope_tokens(
    start, stop, x, token_stride, head_stride, cos_sin, num_positions, positions, y, num_heads, head_dim, direction
):
    for t in range(start, stop):
        table_row = cos_sin_row(cos_sin, num_positions, row64(positions, t, 1)[0], head_dim)
        for n in range(num_heads):
            row = row32(x, t * token_stride + n * head_stride, head_dim)
            out = row32(y, (t * num_heads + n) * head_dim, head_dim)
            rotate_row(row, table_row, np.float32(direction), out)


def _apply_rope_triton(x: Tensor, cos_sin: Tensor, positions: Tensor, direction: float = 1.0) -> Tensor:
    num_tokens, num_heads, head_dim = x.shape
    x = x if x.stride(2) == 1 else x.contiguous()
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel():
        _apply_rope_kernel[(num_tokens,)](
            x, cos_sin, positions, y, x.stride(0), x.stride(1), num_heads, direction,
            HALF=head_dim // 2, BLOCK_HALF=triton.next_power_of_2(head_dim // 2),
            BLOCK_HEADS=min(8, triton.next_power_of_2(num_heads)), enable_fp_fusion=False,
        )  # fmt: skip
    return y


@triton.jit
def _apply_rope_kernel(
    x_ptr, cos_sin_ptr, positions_ptr, y_ptr, token_stride, head_stride, num_heads, direction,
    HALF: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_HEADS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_HALF)
    in_half = columns < HALF
    position = tl.load(positions_ptr + token)
    cos = tl.load(cos_sin_ptr + position * (2 * HALF) + columns, mask=in_half, other=0.0)[None, :]
    sin = tl.load(cos_sin_ptr + position * (2 * HALF) + HALF + columns, mask=in_half, other=0.0)[None, :] * direction
    for start in range(0, num_heads, BLOCK_HEADS):
        heads = start + tl.arange(0, BLOCK_HEADS)
        mask = (heads < num_heads)[:, None] & in_half[None, :]
        source = x_ptr + token * token_stride + heads[:, None] * head_stride + columns[None, :]
        target = y_ptr + (token * num_heads + heads[:, None]) * (2 * HALF) + columns[None, :]
        first = tl.load(source, mask=mask, other=0.0).to(tl.float32)
        second = tl.load(source + HALF, mask=mask, other=0.0).to(tl.float32)
        dtype = y_ptr.dtype.element_ty
        tl.store(target, (first * cos - second * sin).to(dtype), mask=mask)
        tl.store(target + HALF, (second * cos + first * sin).to(dtype), mask=mask)


class _ApplyRope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos_sin, positions):
        ctx.save_for_backward(cos_sin, positions)
        return _rotate(x, cos_sin, positions, 1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return _rotate(dy, *ctx.saved_tensors, -1.0), None, None
