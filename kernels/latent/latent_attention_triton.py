"""Paged latent attention on the GPU, of the construction of attention_triton.py: one kernel for prefill, decode and the
trainer, with equal bits.

Splits lie at absolute positions 0, SPLIT, 2 * SPLIT, ..., a split's partial result starts afresh, partials are merged
in ascending order, and keys come in tiles of KV_TILE; the number of query rows in a tile is free. A row of the cache
is read once, as two blocks of columns: the first `value_dim`, which are its value as well, and the rest. A score is the
product over the first block, then the second, in one accumulator.
"""

import torch
import triton
import triton.language as tl

from lockstep.kernels.attention.attention_triton import KV_TILE, LOG2_E, SPLIT, _merge, locate_tile

# One tile of keys in the dtype of the GPU path, bf16, leaves room for the queries in a Hopper's shared memory.
MAX_WIDTH = 1024


def latent_attention_forward(
    q: torch.Tensor,
    cache: torch.Tensor,
    value_dim: int,
    page_table: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    kv_lens: torch.Tensor,
    scale: float,
    with_lse: bool,
    tile_rows: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`lockstep.kernels.latent_attention.latent_attention` in Triton; also the log-sum-exp [H, T] fp32 if asked for.

    Nothing here waits for the GPU. tile_rows (a power of 2, at least 16) defaults to a choice by shapes; tests pass it
    to show that it does not matter.
    """
    q = q.detach()
    q = q if q.stride(2) == 1 else q.contiguous()
    num_tokens, num_heads, width = q.shape
    if not cache.is_contiguous():
        raise ValueError("the latent cache was not made by new_latent_cache")
    if width > MAX_WIDTH:
        raise ValueError(f"latent_attention on a GPU takes rows of at most {MAX_WIDTH}, got {width}")
    num_requests = kv_lens.shape[0]
    out = torch.empty((num_tokens, num_heads, value_dim), dtype=q.dtype, device=q.device)
    lse = torch.empty((num_heads, num_tokens), dtype=torch.float32, device=q.device) if with_lse else None
    if num_tokens == 0 or num_requests == 0:
        return out, lse
    if tile_rows is None:
        tile_rows = default_tile_rows(num_tokens * num_heads, num_requests, q.dtype)
    num_tiles = num_tokens * num_heads // tile_rows + num_requests
    _latent_kernel[(num_tiles,)](
        q,
        cache,
        page_table,
        cu_seqlens_q,
        kv_lens,
        num_requests,
        page_table.stride(0),
        q.stride(0),
        q.stride(1),
        scale * LOG2_E,
        out,
        out if lse is None else lse,
        num_tokens,
        NUM_HEADS=num_heads,
        WIDTH=width,
        VALUE_DIM=value_dim,
        PAGE_SIZE=cache.shape[2],
        TILE_ROWS=tile_rows,
        BLOCK_REQUESTS=triton.next_power_of_2(num_requests),
        **block_sizes(width, value_dim),
        SPLIT=SPLIT,
        KV_TILE=KV_TILE,
        WITH_LSE=with_lse,
        num_warps=8 if tile_rows > 16 else 4,
        num_stages=1,
    )
    return out, lse


def default_tile_rows(num_rows: int, num_requests: int, dtype: torch.dtype) -> int:
    """Query rows of a tile, by the number of rows per request.

    Few: a program holds the outputs of a split and of those before it, of 512 columns each, in registers. fp32 tiles
    take twice the shared memory.
    """
    return 32 if dtype != torch.float32 and num_rows > 16 * num_requests else 16


def block_sizes(width: int, value_dim: int) -> dict[str, int]:
    """Powers of 2 that hold the columns that are key and value, and those that are key alone (possibly none)."""
    return {
        "BLOCK_VALUE": max(16, triton.next_power_of_2(value_dim)),
        "BLOCK_REST": max(16, triton.next_power_of_2(width - value_dim)) if width > value_dim else 0,
    }


@triton.jit
def load_columns(ptr, offsets, exists, FIRST: tl.constexpr, END: tl.constexpr, BLOCK: tl.constexpr):
    """The columns [FIRST, END) of the rows that begin at `offsets`, as a tile [rows, BLOCK], 0 elsewhere."""
    column = FIRST + tl.arange(0, BLOCK)
    return tl.load(ptr + offsets[:, None] + column[None, :], mask=exists[:, None] & (column < END)[None, :], other=0.0)


@triton.jit
def _latent_kernel(
    q_ptr,
    cache_ptr,
    page_table_ptr,
    cu_seqlens_ptr,
    kv_lens_ptr,
    num_requests,
    page_table_stride,
    q_token_stride,
    q_head_stride,
    scale_log2,
    out_ptr,
    lse_ptr,
    num_tokens,
    NUM_HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    BLOCK_REQUESTS: tl.constexpr,
    SPLIT: tl.constexpr,
    KV_TILE: tl.constexpr,
    WITH_LSE: tl.constexpr,
):
    request, token, head, position = locate_tile(
        cu_seqlens_ptr, kv_lens_ptr, num_requests, NUM_HEADS, TILE_ROWS, BLOCK_REQUESTS
    )
    high = tl.max(position, 0) + 1
    if high == 0:
        return
    row_exists = position >= 0
    q_rows = token.to(tl.int64) * q_token_stride + head * q_head_stride
    q_value = load_columns(q_ptr, q_rows, row_exists, 0, VALUE_DIM, BLOCK_VALUE)
    if BLOCK_REST > 0:
        q_rest = load_columns(q_ptr, q_rows, row_exists, VALUE_DIM, WIDTH, BLOCK_REST)
    pages_ptr = page_table_ptr + request.to(tl.int64) * page_table_stride
    ones = tl.full((KV_TILE, 16), 1.0, q_value.dtype)
    total_m = tl.full((TILE_ROWS,), float("-inf"), tl.float32)
    total_sums = tl.zeros((TILE_ROWS,), tl.float32)
    total_acc = tl.zeros((TILE_ROWS, BLOCK_VALUE), tl.float32)
    for split in range(0, high, SPLIT):
        m = tl.full((TILE_ROWS,), float("-inf"), tl.float32)
        sums = tl.zeros((TILE_ROWS, 16), tl.float32)
        acc = tl.zeros((TILE_ROWS, BLOCK_VALUE), tl.float32)
        end = tl.minimum(split + SPLIT, high)
        for tile_begin in range(split, end, KV_TILE):
            key = tile_begin + tl.arange(0, KV_TILE)
            exists = key < end
            page = tl.load(pages_ptr + key // PAGE_SIZE, mask=exists, other=0).to(tl.int64)
            rows = (page * PAGE_SIZE + key % PAGE_SIZE) * WIDTH
            value = load_columns(cache_ptr, rows, exists, 0, VALUE_DIM, BLOCK_VALUE)
            scores = tl.dot(q_value, tl.trans(value), input_precision="ieee")
            if BLOCK_REST > 0:
                rest = load_columns(cache_ptr, rows, exists, VALUE_DIM, WIDTH, BLOCK_REST)
                scores = tl.dot(q_rest, tl.trans(rest), scores, input_precision="ieee")
            visible = (key[None, :] <= position[:, None]) & exists[None, :]
            scores = tl.where(visible, scores, float("-inf"))
            new_m = tl.maximum(m, tl.max(scores, 1))
            # A row that has seen no key yet has m = -inf; -inf - -inf would be NaN.
            finite_m = tl.where(new_m == float("-inf"), 0.0, new_m)
            p = tl.exp2(tl.fma(scores, scale_log2, -(finite_m * scale_log2)[:, None])).to(q_value.dtype)
            shrink = tl.exp2((m - finite_m) * scale_log2)[:, None]
            sums = tl.dot(p, ones, sums * shrink, input_precision="ieee")
            acc = tl.dot(p, value, acc * shrink, input_precision="ieee")
            m = new_m
        total_m, total_sums, total_acc = _merge(total_m, total_sums, total_acc, m, tl.max(sums, 1), acc, scale_log2)
    total_sums = tl.where(row_exists, total_sums, 1.0)
    column = tl.arange(0, BLOCK_VALUE)
    out_rows = (token.to(tl.int64) * NUM_HEADS + head) * VALUE_DIM
    out = (total_acc / total_sums[:, None]).to(out_ptr.dtype.element_ty)
    mask = row_exists[:, None] & (column < VALUE_DIM)[None, :]
    tl.store(out_ptr + out_rows[:, None] + column[None, :], out, mask=mask)
    if WITH_LSE:
        lse = (total_m * scale_log2 + tl.log2(total_sums)) * 0.6931471805599453
        tl.store(lse_ptr + head.to(tl.int64) * num_tokens + token, lse, mask=row_exists)
