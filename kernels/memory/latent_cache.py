"""Paged cache of multi-head latent attention: one row per token and layer, whose first columns are its value too.

The cache has the logical shape and the memory layout [num_pages, 1, page_size, width].
"""

import numpy as np
import torch
import triton
import triton.language as tl

from lockstep.kernels._cpu import address_of, exact_njit, row32
from lockstep.kernels.memory.kv_cache import CPU_VECTOR, checked_slot


def new_latent_cache(
    num_pages: int, page_size: int, width: int, dtype: torch.dtype, device: torch.device | str
) -> torch.Tensor:
    """Allocate the cache of one layer, [num_pages, 1, page_size, width], uninitialised.

    Raises ValueError for a page size outside 1..64 or an empty dimension.
    """
    if not 1 <= page_size <= 64:
        raise ValueError(f"page_size must be in 1..64, got {page_size}")
    if min(num_pages, width) < 1:
        raise ValueError(f"empty latent cache: {num_pages=} {width=}")
    size = num_pages * page_size * width
    # The CPU attention kernel reads whole vectors, so it may read past the last row.
    margin = CPU_VECTOR if torch.device(device).type == "cpu" else 0
    return torch.empty(size + margin, dtype=dtype, device=device)[:size].view(num_pages, 1, page_size, width)


def cpu_array(cache: torch.Tensor) -> np.ndarray:
    """The array of a CPU cache. Raises ValueError for one that `new_latent_cache` did not make."""
    check_cpu_cache(cache)
    return cache.numpy()


def check_cpu_cache(cache: torch.Tensor) -> None:
    """Raises what `cpu_array` does."""
    if cache.dtype != torch.float32:
        raise ValueError(f"the CPU kernels are fp32 only, got a cache of {cache.dtype}")
    if (
        not (cache.is_cpu and cache.is_contiguous())
        or cache.ndim != 4
        or cache.shape[1] != 1
        or cache.untyped_storage().nbytes() != 4 * (cache.numel() + CPU_VECTOR)
    ):
        raise ValueError("the latent cache was not made by new_latent_cache")


def latent_store(rows: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor) -> None:
    """Write the rows of new tokens into their slots, in place.

        for t in range(T):
            page, offset = divmod(slots[t], page_size)
            cache[page, 0, offset] = rows[t]                                # unless slots[t] == -1

    rows: [T, W]; cache: from `new_latent_cache`; slots: [T] int64, distinct (-1: a padding row, skipped). Raises
    ValueError for shapes or dtypes that do not fit.
    """
    if rows.ndim != 2 or rows.shape[1] != cache.shape[3] or slots.shape != rows.shape[:1]:
        raise ValueError(
            f"latent_store: rows {list(rows.shape)} and slots {list(slots.shape)} do not fit a cache of "
            f"{list(cache.shape)}"
        )
    if rows.dtype != cache.dtype or slots.dtype != torch.int64:
        raise ValueError(f"latent_store: rows {rows.dtype}, cache {cache.dtype}, slots {slots.dtype} do not fit")
    (_latent_store_triton if rows.is_cuda else _latent_store_cpu)(rows, cache, slots)


def latent_store_reference(rows: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor) -> None:
    """`latent_store` in plain torch."""
    used = slots >= 0
    cache[slots[used] // cache.shape[2], 0, slots[used] % cache.shape[2]] = rows[used]


def _latent_store_cpu(rows: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor) -> None:
    check_cpu_cache(cache)
    rows, slots = rows.detach().contiguous(), slots.contiguous()
    num_pages, _, page_size, width = cache.shape
    _store_rows(
        0, rows.shape[0], address_of(rows), cache.data_ptr(), address_of(slots, torch.int64), num_pages * page_size,
        width,
    )  # fmt: skip


@exact_njit
def _store_rows(start, stop, rows, cache, slots, num_slots, width):
    for token in range(start, stop):
        slot = checked_slot(slots, token, num_slots)
        if slot >= 0:
            source, target = row32(rows, token * width, width), row32(cache, slot * width, width)
            for j in range(width):
                target[j] = source[j]


def _latent_store_triton(rows: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor) -> None:
    num_tokens, width = rows.shape
    if num_tokens == 0:
        return
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    _store_kernel[(num_tokens,)](
        rows, cache, slots, rows.stride(0), WIDTH=width, BLOCK=triton.next_power_of_2(width)
    )  # fmt: skip


@triton.jit
def _store_kernel(rows_ptr, cache_ptr, slots_ptr, row_stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token)
    if slot < 0:
        return
    column = tl.arange(0, BLOCK)
    row = tl.load(rows_ptr + token * row_stride + column, mask=column < WIDTH)
    tl.store(cache_ptr + slot * WIDTH + column, row, mask=column < WIDTH)
