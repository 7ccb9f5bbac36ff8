"""What attention needs of a fused projection, in one pass: queries, and keys and values in their cache slots."""

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from lockstep.kernels._cpu import address_of, exact_njit, parallel_rows, row32, row64
from lockstep.kernels._triton import begin_overlapped, launches_overlap, tree_sum
from lockstep.kernels.memory.kv_cache import check_cpu_caches, checked_slot, kv_store, store_head
from lockstep.kernels.norm_rope.rms_norm import rms_norm, rms_norm_row, rms_norm_tile, rstd_of
from lockstep.kernels.norm_rope.rope import apply_rope, cos_sin_row, rotate_row

_ELEMENTS_PER_THREAD = 32768
_FORWARD = np.float32(1.0)


def qk_norm_rope_store(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    cos_sin: Tensor,
    positions: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
) -> Tensor:
    """qkv[T, HKV * (R + 2) * D] -> q[T, HKV * R, D], normed and rotated; keys and values go to their slots.

        q, k, v = split(qkv)                                     # per KV head: its R query heads, its key, its value
        q, k = rms_norm(q, q_weight, eps), rms_norm(k, k_weight, eps)          # each unless its weight is None
        q, k = apply_rope(q, cos_sin, positions), apply_rope(k, cos_sin, positions)
        kv_store(k, v, k_cache, v_cache, slots)                                # not where the slot is -1

    The bits are those of the separate ops. q_weight, k_weight: [D]; cos_sin: fp32 [P, D]; positions, slots: int64 [T];
    k_cache, v_cache: from `new_kv_cache`, whose shape gives HKV and D. qkv's rows may be strided. Without
    autograd. Errors are those of the separate ops; a GPU does not look for positions and slots that lie outside.
    """
    num_kv_heads, head_dim = k_cache.shape[1], k_cache.shape[3]
    num_columns = qkv.shape[1]
    group_size = num_columns // (num_kv_heads * head_dim) - 2
    if group_size < 1 or num_columns != num_kv_heads * (group_size + 2) * head_dim:
        raise ValueError(
            f"qk_norm_rope_store: qkv {list(qkv.shape)} is not made of whole KV groups of a cache {list(k_cache.shape)}"
        )
    forward = _qk_norm_rope_store_triton if qkv.is_cuda else _qk_norm_rope_store_cpu
    return forward(qkv, q_weight, k_weight, eps, cos_sin, positions, k_cache, v_cache, slots)


def qk_norm_rope_store_reference(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    cos_sin: Tensor,
    positions: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
) -> Tensor:
    """`qk_norm_rope_store` as the separate ops."""
    num_kv_heads, head_dim = k_cache.shape[1], k_cache.shape[3]
    by_group = qkv.view(qkv.shape[0], num_kv_heads, qkv.shape[1] // (num_kv_heads * head_dim), head_dim)
    q, k, v = by_group[:, :, :-2].flatten(1, 2), by_group[:, :, -2], by_group[:, :, -1]
    if q_weight is not None:
        q = rms_norm(q, q_weight, eps)
    if k_weight is not None:
        k = rms_norm(k, k_weight, eps)
    q, k = apply_rope(q, cos_sin, positions), apply_rope(k, cos_sin, positions)
    kv_store(k, v, k_cache, v_cache, slots)
    return q


def _check(
    qkv: Tensor, weights: tuple[Tensor | None, ...], cos_sin: Tensor, positions: Tensor, slots: Tensor, head_dim: int
) -> None:
    num_tokens = qkv.shape[0]
    for weight in weights:
        if weight is not None and weight.shape != (head_dim,):
            raise ValueError(f"qk_norm_rope_store: a weight {list(weight.shape)} does not fit heads of {head_dim}")
    if cos_sin.shape[1] != head_dim or positions.shape != (num_tokens,) or slots.shape != (num_tokens,):
        raise ValueError(
            f"qk_norm_rope_store: qkv {list(qkv.shape)}, cos_sin {list(cos_sin.shape)}, positions "
            f"{list(positions.shape)} and slots {list(slots.shape)} do not fit"
        )


def _qk_norm_rope_store_cpu(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    cos_sin: Tensor,
    positions: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
) -> Tensor:
    num_tokens, num_columns = qkv.shape
    num_pages, num_kv_heads, page_size, head_dim = k_cache.shape
    if qkv.dtype is not torch.float32:
        raise ValueError(f"qk_norm_rope_store on the CPU takes float32, not {qkv.dtype}")
    _check(qkv, (q_weight, k_weight), cos_sin, positions, slots, head_dim)
    check_cpu_caches(k_cache, v_cache)
    if qkv.stride(1) != 1:
        qkv = qkv.contiguous()
    cos_sin, positions, slots = cos_sin.contiguous(), positions.contiguous(), slots.contiguous()
    group_size = num_columns // (num_kv_heads * head_dim) - 2
    q = torch.empty((num_tokens, num_kv_heads * group_size, head_dim), dtype=torch.float32, device="cpu")
    parallel_rows(
        _tokens,
        num_tokens,
        _ELEMENTS_PER_THREAD // num_columns + 1,
        qkv.data_ptr(), qkv.stride(0),
        0 if q_weight is None else address_of(q_weight),
        0 if k_weight is None else address_of(k_weight),
        eps, address_of(cos_sin), cos_sin.shape[0], address_of(positions, torch.int64), q.data_ptr(),
        k_cache.data_ptr(), v_cache.data_ptr(), num_pages * page_size, address_of(slots, torch.int64),
        page_size, num_kv_heads, group_size, head_dim,
    )  # fmt: skip
    return q


@exact_njit
def _tokens(
    start, stop, qkv, row_stride, q_weight, k_weight, eps, cos_sin, num_positions, positions, q,
    k_cache, v_cache, num_slots, slots, page_size, num_kv_heads, group_size, head_dim,
):  # fmt: skip
    q_scale, k_scale = row32(q_weight, 0, head_dim), row32(k_weight, 0, head_dim)
    normed, key = np.empty(head_dim, np.float32), np.empty(head_dim, np.float32)
    for t in range(start, stop):
        table_row = cos_sin_row(cos_sin, num_positions, row64(positions, t, 1)[0], head_dim)
        slot = checked_slot(slots, t, num_slots)
        for group in range(num_kv_heads):
            offset = t * row_stride + group * (group_size + 2) * head_dim
            out_offset = (t * num_kv_heads + group) * group_size * head_dim
            for head in range(group_size):
                row = row32(qkv, offset + head * head_dim, head_dim)
                if q_weight != 0:
                    rms_norm_row(row, q_scale, eps, normed)
                    row = normed
                rotate_row(row, table_row, _FORWARD, row32(q, out_offset + head * head_dim, head_dim))
            if slot < 0:
                continue
            row = row32(qkv, offset + group_size * head_dim, head_dim)
            value = row32(qkv, offset + (group_size + 1) * head_dim, head_dim)
            if k_weight != 0:
                rms_norm_row(row, k_scale, eps, normed)
                row = normed
            rotate_row(row, table_row, _FORWARD, key)
            store_head(key, value, k_cache, v_cache, slot, group, page_size, num_kv_heads)


def _qk_norm_rope_store_triton(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    cos_sin: Tensor,
    positions: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
) -> Tensor:
    num_tokens, num_columns = qkv.shape
    num_kv_heads, page_size, head_dim = k_cache.shape[1:]
    _check(qkv, (q_weight, k_weight), cos_sin, positions, slots, head_dim)
    if not (qkv.dtype == k_cache.dtype == v_cache.dtype) or slots.dtype != torch.int64:
        raise ValueError(
            f"qk_norm_rope_store: dtypes qkv {qkv.dtype}, caches {k_cache.dtype} and {v_cache.dtype}, slots "
            f"{slots.dtype} do not fit"
        )
    if qkv.stride(1) != 1:
        qkv = qkv.contiguous()
    num_heads = num_columns // head_dim
    group_size = num_heads // num_kv_heads - 2
    q = torch.empty((num_tokens, num_kv_heads * group_size, head_dim), dtype=qkv.dtype, device=qkv.device)
    if num_tokens == 0:
        return q
    block_half = triton.next_power_of_2(head_dim // 2)
    heads = max(1, _TILE // (2 * block_half))
    weights = (qkv if weight is None else weight for weight in (q_weight, k_weight))
    overlap = launches_overlap(qkv.device)
    _qk_norm_rope_store_kernel[(num_tokens, triton.cdiv(num_heads, heads))](
        qkv, *weights, cos_sin, positions, slots, q, k_cache, v_cache,
        qkv.stride(0), *k_cache.stride()[:3], *v_cache.stride()[:3], num_heads, eps,
        Q_NORM=q_weight is not None, K_NORM=k_weight is not None, GROUP_SIZE=group_size, PAGE_SIZE=page_size,
        HALF=head_dim // 2, HEADS=heads, BLOCK_HALF=block_half, OVERLAP=overlap, enable_fp_fusion=False,
        launch_pdl=overlap,
    )  # fmt: skip
    return q


# A program has a tile of so many elements, heads by columns, of one token.
_TILE = 2048


@triton.jit
def _qk_norm_rope_store_kernel(
    qkv_ptr, q_weight_ptr, k_weight_ptr, cos_sin_ptr, positions_ptr, slots_ptr, q_ptr, k_cache_ptr, v_cache_ptr,
    token_stride, k_page_stride, k_head_stride, k_slot_stride, v_page_stride, v_head_stride, v_slot_stride,
    num_heads, eps, Q_NORM: tl.constexpr, K_NORM: tl.constexpr, GROUP_SIZE: tl.constexpr, PAGE_SIZE: tl.constexpr,
    HALF: tl.constexpr, HEADS: tl.constexpr, BLOCK_HALF: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    begin_overlapped(OVERLAP)
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token)
    angles = cos_sin_ptr + tl.load(positions_ptr + token) * (2 * HALF)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    group, member = heads // (GROUP_SIZE + 2), heads % (GROUP_SIZE + 2)
    is_q, is_k, is_v = member < GROUP_SIZE, member == GROUP_SIZE, member > GROUP_SIZE
    columns = tl.arange(0, BLOCK_HALF)
    in_half = columns < HALF
    mask = (heads < num_heads)[:, None] & in_half[None, :]
    dtype = q_ptr.dtype.element_ty

    heads_ptr = qkv_ptr + token * token_stride + heads[:, None] * (2 * HALF)
    first_value = tl.load(heads_ptr + columns[None, :], mask=mask, other=0.0)
    second_value = tl.load(heads_ptr + HALF + columns[None, :], mask=mask, other=0.0)
    cos = tl.load(angles + columns, mask=in_half, other=0.0)[None, :]
    sin = tl.load(angles + HALF + columns, mask=in_half, other=0.0)[None, :]
    first, second = first_value.to(tl.float32), second_value.to(tl.float32)
    if Q_NORM or K_NORM:
        if HALF == BLOCK_HALF:
            square_sum = tree_sum(first * first) + tree_sum(second * second)
        else:  # the row's tree does not part between the halves
            all_columns = tl.arange(0, 2 * BLOCK_HALF)
            whole_mask = (heads < num_heads)[:, None] & (all_columns < 2 * HALF)[None, :]
            whole = tl.load(heads_ptr + all_columns[None, :], mask=whole_mask, other=0.0).to(tl.float32)
            square_sum = tree_sum(whole * whole)
        rstd = rstd_of(square_sum, 2 * HALF, eps)
        q_scale_ptr = q_weight_ptr if Q_NORM else k_weight_ptr
        k_scale_ptr = k_weight_ptr if K_NORM else q_weight_ptr
        first_normed = _normed(first, is_q, q_scale_ptr + columns, k_scale_ptr + columns, in_half, rstd, dtype)
        q_scale_ptr, k_scale_ptr = q_scale_ptr + HALF, k_scale_ptr + HALF
        second_normed = _normed(second, is_q, q_scale_ptr + columns, k_scale_ptr + columns, in_half, rstd, dtype)
        if Q_NORM and K_NORM:
            first, second = first_normed, second_normed
        else:
            has_norm = (is_q if Q_NORM else is_k)[:, None]
            first, second = tl.where(has_norm, first_normed, first), tl.where(has_norm, second_normed, second)
    first_rotated, second_rotated = (first * cos - second * sin).to(dtype), (second * cos + first * sin).to(dtype)

    q_heads = (token * (num_heads // (GROUP_SIZE + 2)) + group) * GROUP_SIZE + member
    _store_heads(q_ptr + q_heads * (2 * HALF), first_rotated, second_rotated, columns, mask & is_q[:, None], HALF)
    page, offset = slot // PAGE_SIZE, slot % PAGE_SIZE
    mask = (heads < tl.where(slot >= 0, num_heads, 0))[:, None] & in_half[None, :]
    k_ptr = k_cache_ptr + page * k_page_stride + offset * k_slot_stride + group * k_head_stride
    _store_heads(k_ptr, first_rotated, second_rotated, columns, mask & is_k[:, None], HALF)
    v_ptr = v_cache_ptr + page * v_page_stride + offset * v_slot_stride + group * v_head_stride
    _store_heads(v_ptr, first_value, second_value, columns, mask & is_v[:, None], HALF)


@triton.jit
def _normed(x, is_q, q_weight_ptr, k_weight_ptr, in_half, rstd, dtype: tl.constexpr):
    q_weight = tl.load(q_weight_ptr, mask=in_half, other=0.0).to(tl.float32)[None, :]
    k_weight = tl.load(k_weight_ptr, mask=in_half, other=0.0).to(tl.float32)[None, :]
    return rms_norm_tile(x, tl.where(is_q[:, None], q_weight, k_weight), rstd, dtype)


@triton.jit
def _store_heads(heads_ptr, first, second, columns, mask, HALF: tl.constexpr):
    target = heads_ptr[:, None] + columns[None, :]
    tl.store(target, first, mask=mask)
    tl.store(target + HALF, second, mask=mask)
