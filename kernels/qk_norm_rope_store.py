"""What attention needs of a fused projection, in one pass: queries, and keys and values in their cache slots."""

import numpy as np
import torch
from torch import Tensor

from lockstep.kernels._cpu import address_of, exact_njit, parallel_rows, row32, row64
from lockstep.kernels.kv_cache import check_cpu_caches, checked_slot, kv_store, store_head
from lockstep.kernels.rms_norm import rms_norm, rms_norm_row
from lockstep.kernels.rope import apply_rope, cos_sin_row, rotate_row

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
    k_cache, v_cache: from `new_kv_cache`, whose shape gives HKV and D. qkv's rows may be strided. Without autograd. On
    a GPU the separate ops run one after another. Errors are those of the separate ops.
    """
    num_kv_heads, head_dim = k_cache.shape[1], k_cache.shape[3]
    num_columns = qkv.shape[1]
    group_size = num_columns // (num_kv_heads * head_dim) - 2
    if group_size < 1 or num_columns != num_kv_heads * (group_size + 2) * head_dim:
        raise ValueError(
            f"qk_norm_rope_store: qkv {list(qkv.shape)} is not made of whole KV groups of a cache {list(k_cache.shape)}"
        )
    forward = _qk_norm_rope_store_cpu if qkv.is_cpu else qk_norm_rope_store_reference
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
    for weight in (q_weight, k_weight):
        if weight is not None and weight.shape != (head_dim,):
            raise ValueError(f"qk_norm_rope_store: a weight {list(weight.shape)} does not fit heads of {head_dim}")
    if cos_sin.shape[1] != head_dim or positions.shape != (num_tokens,) or slots.shape != (num_tokens,):
        raise ValueError(
            f"qk_norm_rope_store: qkv {list(qkv.shape)}, cos_sin {list(cos_sin.shape)}, positions "
            f"{list(positions.shape)} and slots {list(slots.shape)} do not fit"
        )
    check_cpu_caches(k_cache, v_cache)
    if qkv.stride(1) != 1:
        qkv = qkv.contiguous()
    cos_sin, positions, slots = cos_sin.contiguous(), positions.contiguous(), slots.contiguous()
    group_size = num_columns // (num_kv_heads * head_dim) - 2
    q = torch.empty((num_tokens, num_kv_heads * group_size, head_dim))
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
