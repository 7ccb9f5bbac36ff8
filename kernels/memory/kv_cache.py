"""Paged KV cache: allocation, and the store of new keys and values into their slots.

Both caches have the logical shape [num_pages, num_kv_heads, page_size, head_dim]. On a GPU that is also the memory
layout. On the CPU the keys of a page lie transposed, [num_pages, num_kv_heads, head_dim, page_size], so that the scores
of consecutive tokens are computed in the lanes of one vector.
"""

import numpy as np
import torch
import triton
import triton.language as tl

from lockstep.kernels._cpu import address_of, exact_njit, inline_njit, row32, row64

# The CPU attention kernel reads whole vectors of this many values, so it may read past the last page.
CPU_VECTOR = 16


def new_kv_cache(
    num_pages: int,
    page_size: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device | str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Allocate the key and the value cache of one layer, uninitialised.

    Returns (k_cache, v_cache), both of logical shape [num_pages, num_kv_heads, page_size, head_dim]. Their strides
    are private to this module. Raises ValueError for a page size outside 1..64 or an empty dimension.
    """
    if not 1 <= page_size <= 64:
        raise ValueError(f"page_size must be in 1..64, got {page_size}")
    if min(num_pages, num_kv_heads, head_dim) < 1:
        raise ValueError(f"empty KV cache: {num_pages=} {num_kv_heads=} {head_dim=}")
    shape = (num_pages, num_kv_heads, page_size, head_dim)
    if torch.device(device).type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device), torch.empty(shape, dtype=dtype, device=device)
    size = num_pages * num_kv_heads * page_size * head_dim
    k_memory, v_memory = (torch.empty(size + CPU_VECTOR, dtype=dtype, device="cpu") for _ in range(2))
    k_cache = k_memory[:size].view(num_pages, num_kv_heads, head_dim, page_size).transpose(2, 3)
    return k_cache, v_memory[:size].view(shape)


def cpu_arrays(k_cache: torch.Tensor, v_cache: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The arrays of a pair of CPU caches, whose memory is keys [P, HKV, D, PS], values [P, HKV, PS, D].

    Raises ValueError for caches that `new_kv_cache` did not make (another layout or dtype, a slice).
    """
    check_cpu_caches(k_cache, v_cache)
    return k_cache.numpy(), v_cache.numpy()


def check_cpu_caches(k_cache: torch.Tensor, v_cache: torch.Tensor) -> None:
    """Raises what `cpu_arrays` does: the memory at the caches' addresses is as said there."""
    num_pages, num_kv_heads, page_size, head_dim = shape = k_cache.shape
    if k_cache.dtype != torch.float32 or v_cache.dtype != torch.float32:
        raise ValueError(f"the CPU kernels are fp32 only, got caches of {k_cache.dtype} and {v_cache.dtype}")
    page = page_size * head_dim
    num_bytes = 4 * (num_pages * num_kv_heads * page + CPU_VECTOR)
    if (
        v_cache.shape != shape
        or k_cache.stride() != (num_kv_heads * page, page, 1, page_size)
        or v_cache.stride() != (num_kv_heads * page, page, head_dim, 1)
        or k_cache.untyped_storage().nbytes() != num_bytes
        or v_cache.untyped_storage().nbytes() != num_bytes
        or not (k_cache.is_cpu and v_cache.is_cpu)
    ):
        raise ValueError("the KV cache was not made by new_kv_cache")


def kv_store(
    k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, slots: torch.Tensor
) -> None:
    """Write the keys and values of new tokens into their slots, in place.

        for t in range(T):
            page, offset = divmod(slots[t], page_size)
            k_cache[page, :, offset], v_cache[page, :, offset] = k[t], v[t]      # unless slots[t] == -1

    k, v: [T, HKV, D]; k_cache, v_cache: from `new_kv_cache`; slots: [T] int64, distinct (-1: a padding row, skipped).
    Raises ValueError for shapes or dtypes that do not fit.
    """
    if k.shape != v.shape or k.ndim != 3 or slots.shape != k.shape[:1]:
        raise ValueError(f"kv_store: shapes k {list(k.shape)}, v {list(v.shape)}, slots {list(slots.shape)} do not fit")
    if (k.shape[1], k.shape[2]) != (k_cache.shape[1], k_cache.shape[3]):
        raise ValueError(f"kv_store: k {list(k.shape)} does not fit a cache of {list(k_cache.shape)}")
    if k.dtype != k_cache.dtype or v.dtype != v_cache.dtype or slots.dtype != torch.int64:
        raise ValueError(f"kv_store: dtypes k {k.dtype}, cache {k_cache.dtype}, slots {slots.dtype} do not fit")
    (_kv_store_triton if k.device.type == "cuda" else _kv_store_cpu)(k, v, k_cache, v_cache, slots)


def kv_store_reference(
    k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, slots: torch.Tensor
) -> None:
    """`kv_store` in plain torch, for caches of any strides."""
    used = slots >= 0
    page, offset = slots[used] // k_cache.shape[2], slots[used] % k_cache.shape[2]
    k_cache[page, :, offset] = k[used]
    v_cache[page, :, offset] = v[used]


def _kv_store_cpu(
    k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, slots: torch.Tensor
) -> None:
    check_cpu_caches(k_cache, v_cache)
    k, v, slots = k.contiguous(), v.contiguous(), slots.contiguous()
    _store_tokens(
        0, k.shape[0], address_of(k), address_of(v), k_cache.data_ptr(), v_cache.data_ptr(), k_cache.shape[0],
        address_of(slots, torch.int64), k_cache.shape[2], k.shape[1], k.shape[2],
    )  # fmt: skip


@inline_njit
def checked_slot(slots, token, num_slots):
    """The token's slot, negative if it has none."""
    slot = row64(slots, token, 1)[0]
    if slot >= num_slots:
        raise ValueError("kv_store: a slot lies outside the cache")
    return slot


@inline_njit
def store_head(k, v, k_cache, v_cache, slot, head, page_size, num_heads):
    """One head of one token of `kv_store`, for the kernels that contain one."""
    head_dim = k.shape[0]
    page, offset = slot // page_size, slot % page_size
    block = (page * num_heads + head) * page_size * head_dim
    k_column = row32(k_cache, block + offset, page_size * head_dim)
    v_row = row32(v_cache, block + offset * head_dim, head_dim)
    for d in range(head_dim):
        k_column[d * page_size] = k[d]
    for d in range(head_dim):
        v_row[d] = v[d]


@exact_njit
def _store_tokens(start, stop, k, v, k_cache, v_cache, num_pages, slots, page_size, num_heads, head_dim):
    for token in range(start, stop):
        slot = checked_slot(slots, token, num_pages * page_size)
        if slot < 0:
            continue
        for head in range(num_heads):
            offset = (token * num_heads + head) * head_dim
            k_row, v_row = row32(k, offset, head_dim), row32(v, offset, head_dim)
            store_head(k_row, v_row, k_cache, v_cache, slot, head, page_size, num_heads)


def _kv_store_triton(
    k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, slots: torch.Tensor
) -> None:
    num_tokens, num_heads, head_dim = k.shape
    if num_tokens == 0:
        return
    block = triton.next_power_of_2(num_heads * head_dim)
    _store_kernel[(num_tokens,)](
        *(k, v, k_cache, v_cache, slots, k.stride(0), v.stride(0), k.stride(1), v.stride(1)),
        *k_cache.stride()[:3],
        *v_cache.stride()[:3],
        num_heads,
        HEAD_DIM=head_dim,
        PAGE_SIZE=k_cache.shape[2],
        BLOCK=block,
    )


@triton.jit
def _store_kernel(
    k_ptr,
    v_ptr,
    k_cache_ptr,
    v_cache_ptr,
    slots_ptr,
    k_token_stride,
    v_token_stride,
    k_head_stride,
    v_head_stride,
    k_page_stride,
    k_cache_head_stride,
    k_slot_stride,
    v_page_stride,
    v_cache_head_stride,
    v_slot_stride,
    num_heads,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token)
    if slot < 0:
        return
    page, offset = slot // PAGE_SIZE, slot % PAGE_SIZE
    column = tl.arange(0, BLOCK)
    head, d = column // HEAD_DIM, column % HEAD_DIM
    mask = head < num_heads
    k = tl.load(k_ptr + token * k_token_stride + head * k_head_stride + d, mask=mask)
    v = tl.load(v_ptr + token * v_token_stride + head * v_head_stride + d, mask=mask)
    k_slot = page * k_page_stride + offset * k_slot_stride
    v_slot = page * v_page_stride + offset * v_slot_stride
    tl.store(k_cache_ptr + k_slot + head * k_cache_head_stride + d, k, mask=mask)
    tl.store(v_cache_ptr + v_slot + head * v_cache_head_stride + d, v, mask=mask)
