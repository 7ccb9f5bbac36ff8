"""Paged attention on the GPU: one family of Triton kernels for prefill, decode and the trainer, with equal bits.

KV is read in tiles of KV_TILE keys and cut into splits at absolute positions 0, SPLIT, 2 * SPLIT, ... A split's partial
result (m, sums, acc in fp32) starts afresh; partials are merged in ascending order by `_merge`. `_prefill_kernel` does
all of that in registers, for any batch; the kernels of attention_decode_triton.py compute the splits of few queries in
parallel. The number of query rows in a tile, the warps and the choice of kernel are free: no bit depends on them, since

- a masked key contributes exp2(-inf) = 0, so a wholly masked tile or split leaves (m, sums, acc) as they were;
- sums over keys run in tl.dot, whose order over keys does not depend on the tile of queries (the row sum is a product
  with ones), and every other multiply-add is an explicit fma, so that no compiler contracts it another way.

A tile is TILE_ROWS rows of one request and one KV group; a row is (token, head of the group).
"""

import torch
import triton
import triton.language as tl

from lockstep.kernels.attention import attention_prefill_hopper

SPLIT = 512
KV_TILE = 64
# Query rows per request, on average, from which the Hopper prefill kernel, with its tiles of 128, is worth it.
MIN_HOPPER_ROWS = 16
LOG2_E = 1.4426950408889634


def attention_forward(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    kv_lens: torch.Tensor,
    scale: float,
    window: int | None,
    with_lse: bool,
    tile_rows: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`lockstep.kernels.attention.attention` in Triton; also the log-sum-exp [H, T] fp32 if asked for.

    Nothing here waits for the GPU: tiles are launched for the largest number that the shapes allow, and the superfluous
    ones return at once. tile_rows (a power of 2, at least 16) defaults to a choice by shapes, and without it a Hopper
    GPU has a prefill kernel of its own; tests pass it to show that it does not matter.
    """
    q = q.detach()
    q = q if q.stride(2) == 1 else q.contiguous()
    num_tokens, num_heads, head_dim = q.shape
    _, num_kv_heads, page_size, _ = k_cache.shape
    if not (k_cache.is_contiguous() and v_cache.is_contiguous()):
        raise ValueError("the KV cache was not made by new_kv_cache")
    group, num_requests = num_heads // num_kv_heads, kv_lens.shape[0]
    out = torch.empty((num_tokens, num_heads, head_dim), dtype=q.dtype, device=q.device)
    lse = torch.empty((num_heads, num_tokens), dtype=torch.float32, device=q.device) if with_lse else None
    if num_tokens == 0 or num_requests == 0:
        return out, lse
    scale_log2 = scale * LOG2_E
    long_enough = num_tokens * group >= MIN_HOPPER_ROWS * num_requests
    if long_enough and tile_rows is None and attention_prefill_hopper.supports(q, k_cache, window):
        attention_prefill_hopper.prefill(
            q, k_cache, v_cache, page_table, cu_seqlens_q, kv_lens, scale_log2, SPLIT, out, lse
        )
        return out, lse
    block_dim = max(16, triton.next_power_of_2(head_dim))
    if tile_rows is None:
        rows_per_request = triton.next_power_of_2(num_tokens * group // num_requests)
        tile_rows = min(max(16, rows_per_request), 128 if block_dim <= 128 and q.dtype != torch.float32 else 64)
    num_tiles = num_tokens * group // tile_rows + num_requests
    sizes = {
        "NUM_HEADS": num_heads,
        "NUM_KV_HEADS": num_kv_heads,
        "HEAD_DIM": head_dim,
        "BLOCK_DIM": block_dim,
        "PAGE_SIZE": page_size,
        "TILE_ROWS": tile_rows,
        "BLOCK_REQUESTS": triton.next_power_of_2(num_requests),
        "SPLIT": SPLIT,
        "WINDOW": window or 0,
        "KV_TILE": KV_TILE,
        "WITH_LSE": with_lse,
    }
    options = {
        "num_warps": 8 if tile_rows >= 128 else 4,
        "num_stages": 2 if block_dim * q.element_size() <= 256 else 1,
    }
    _prefill_kernel[(num_tiles, num_kv_heads)](
        q,
        k_cache,
        v_cache,
        page_table,
        cu_seqlens_q,
        kv_lens,
        num_requests,
        page_table.stride(0),
        q.stride(0),
        q.stride(1),
        scale_log2,
        out,
        out if lse is None else lse,
        num_tokens,
        **sizes,
        **options,
    )
    return out, lse


@triton.jit
def locate_tile(
    cu_seqlens_ptr,
    kv_lens_ptr,
    num_requests,
    GROUP: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    BLOCK_REQUESTS: tl.constexpr,
):
    """Which rows this program has: request, per row its token, head in the group and position (-1: none).

    Request r owns the tiles from cu_seqlens[r] * GROUP // TILE_ROWS + r on, which are as many as it needs or one more.
    """
    tile = tl.program_id(0)
    requests = tl.arange(0, BLOCK_REQUESTS)
    begins = tl.load(cu_seqlens_ptr + requests, mask=requests < num_requests, other=0)
    first_tiles = begins * GROUP // TILE_ROWS + requests
    request = tl.sum(((first_tiles <= tile) & (requests < num_requests)).to(tl.int32), 0) - 1
    begin = tl.load(cu_seqlens_ptr + request)
    end = tl.load(cu_seqlens_ptr + request + 1)
    kv_len = tl.load(kv_lens_ptr + request)
    row = (tile - begin * GROUP // TILE_ROWS - request) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    token = begin + row // GROUP
    position = tl.where(token < end, kv_len - end + token, -1)
    return request, token, row % GROUP, position


@triton.jit
def visible_span(position, WINDOW: tl.constexpr):
    """The keys [low, high) that any row of the tile sees."""
    high = tl.max(position, 0) + 1
    low = 0
    if WINDOW > 0:
        lowest = tl.min(tl.where(position >= 0, position, 1 << 30), 0)
        low = tl.maximum(lowest - WINDOW + 1, 0)
    return low, high


@triton.jit
def _load_queries(
    q_ptr, token, head, position, token_stride, head_stride, HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr
):
    d = tl.arange(0, BLOCK_DIM)
    rows = token.to(tl.int64) * token_stride + head * head_stride
    return tl.load(
        q_ptr + rows[:, None] + d[None, :], mask=(position >= 0)[:, None] & (d < HEAD_DIM)[None, :], other=0.0
    )


@triton.jit
def _no_keys(TILE_ROWS: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """The (m, sums, acc) of no keys at all."""
    m = tl.full((TILE_ROWS,), float("-inf"), tl.float32)
    return m, tl.zeros((TILE_ROWS,), tl.float32), tl.zeros((TILE_ROWS, BLOCK_DIM), tl.float32)


@triton.jit
def _attend_split(
    m,
    row_sums,
    acc,
    q,
    position,
    k_cache_ptr,
    v_cache_ptr,
    pages_ptr,
    kv_head,
    begin,
    end,
    scale_log2,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    SPLIT: tl.constexpr,
    KV_TILE: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """The partial (m, row_sums, acc) of a split after the keys [begin, end), given the one before them.

    m is the largest unscaled score. `begin` is a multiple of KV_TILE. The sums are held in 16 equal columns.
    """
    sums = tl.zeros((TILE_ROWS, 16), tl.float32) + row_sums[:, None]
    d = tl.arange(0, BLOCK_DIM)
    in_tile = tl.arange(0, KV_TILE)
    ones = tl.full((KV_TILE, 16), 1.0, q.dtype)
    if PAGE_SIZE == KV_TILE:
        # All page ids of the split at once: in the loop, the loads of keys and values depend on no other load.
        page_index = tl.arange(0, SPLIT // KV_TILE)
        first_page = begin // KV_TILE
        pages = tl.load(pages_ptr + first_page + page_index, mask=(first_page + page_index) * KV_TILE < end, other=0)
    for tile_begin in range(begin, end, KV_TILE):
        key = tile_begin + in_tile
        exists = key < end
        if PAGE_SIZE == KV_TILE:
            page = tl.sum(tl.where(page_index == tile_begin // KV_TILE - first_page, pages, 0), 0).to(tl.int64)
            tile_offset = (page * NUM_KV_HEADS + kv_head) * PAGE_SIZE * HEAD_DIM
            k_ptr, v_ptr, slot = k_cache_ptr + tile_offset, v_cache_ptr + tile_offset, in_tile * HEAD_DIM
        else:
            page = tl.load(pages_ptr + key // PAGE_SIZE, mask=exists, other=0).to(tl.int64)
            k_ptr, v_ptr = k_cache_ptr, v_cache_ptr
            slot = ((page * NUM_KV_HEADS + kv_head) * PAGE_SIZE + key % PAGE_SIZE) * HEAD_DIM
        k = tl.load(k_ptr + slot[None, :] + d[:, None], mask=exists[None, :] & (d < HEAD_DIM)[:, None], other=0.0)
        v = tl.load(v_ptr + slot[:, None] + d[None, :], mask=exists[:, None] & (d < HEAD_DIM)[None, :], other=0.0)
        visible = (key[None, :] <= position[:, None]) & exists[None, :]
        if WINDOW > 0:
            visible = visible & (key[None, :] > position[:, None] - WINDOW)
        scores = tl.where(visible, tl.dot(q, k, input_precision="ieee"), float("-inf"))
        new_m = tl.maximum(m, tl.max(scores, 1))
        # A row that has seen no key yet has m = -inf; -inf - -inf would be NaN.
        finite_m = tl.where(new_m == float("-inf"), 0.0, new_m)
        p = tl.exp2(tl.fma(scores, scale_log2, -(finite_m * scale_log2)[:, None])).to(q.dtype)
        shrink = tl.exp2((m - finite_m) * scale_log2)[:, None]
        sums = tl.dot(p, ones, sums * shrink, input_precision="ieee")
        acc = tl.dot(p, v, acc * shrink, input_precision="ieee")
        m = new_m
    return m, tl.max(sums, 1), acc


@triton.jit
def _merge(total_m, total_sums, total_acc, m, sums, acc, scale_log2):
    """Fold the partial result of the next split into the total."""
    new_m = tl.maximum(total_m, m)
    finite_m = tl.where(new_m == float("-inf"), 0.0, new_m)
    old = tl.exp2((total_m - finite_m) * scale_log2)
    new = tl.exp2((m - finite_m) * scale_log2)
    return new_m, tl.fma(total_sums, old, sums * new), tl.fma(total_acc, old[:, None], acc * new[:, None])


@triton.jit
def _write(
    m,
    sums,
    acc,
    out_ptr,
    lse_ptr,
    token,
    head,
    position,
    num_tokens,
    scale_log2,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    WITH_LSE: tl.constexpr,
):
    exists = position >= 0
    sums = tl.where(exists, sums, 1.0)
    d = tl.arange(0, BLOCK_DIM)
    rows = (token.to(tl.int64) * NUM_HEADS + head) * HEAD_DIM
    out = (acc / sums[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + rows[:, None] + d[None, :], out, mask=exists[:, None] & (d < HEAD_DIM)[None, :])
    if WITH_LSE:
        lse = (m * scale_log2 + tl.log2(sums)) * 0.6931471805599453
        tl.store(lse_ptr + head.to(tl.int64) * num_tokens + token, lse, mask=exists)


@triton.jit
def _prefill_kernel(
    q_ptr,
    k_cache_ptr,
    v_cache_ptr,
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
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    BLOCK_REQUESTS: tl.constexpr,
    SPLIT: tl.constexpr,
    WINDOW: tl.constexpr,
    KV_TILE: tl.constexpr,
    WITH_LSE: tl.constexpr,
):
    GROUP: tl.constexpr = NUM_HEADS // NUM_KV_HEADS
    kv_head = tl.program_id(1)
    request, token, head, position = locate_tile(
        cu_seqlens_ptr, kv_lens_ptr, num_requests, GROUP, TILE_ROWS, BLOCK_REQUESTS
    )
    low, high = visible_span(position, WINDOW)
    if high == 0:
        return
    head += kv_head * GROUP
    q = _load_queries(q_ptr, token, head, position, q_token_stride, q_head_stride, HEAD_DIM, BLOCK_DIM)
    pages_ptr = page_table_ptr + request.to(tl.int64) * page_table_stride
    no_m, no_sums, no_acc = _no_keys(TILE_ROWS, BLOCK_DIM)
    total_m, total_sums, total_acc = no_m, no_sums, no_acc
    for split in range(low // SPLIT * SPLIT, high, SPLIT):
        begin = tl.maximum(split, low // KV_TILE * KV_TILE)
        m, sums, acc = _attend_split(
            no_m,
            no_sums,
            no_acc,
            q,
            position,
            k_cache_ptr,
            v_cache_ptr,
            pages_ptr,
            kv_head,
            begin,
            tl.minimum(split + SPLIT, high),
            scale_log2,
            NUM_KV_HEADS,
            HEAD_DIM,
            BLOCK_DIM,
            PAGE_SIZE,
            TILE_ROWS,
            SPLIT,
            KV_TILE,
            WINDOW,
        )
        total_m, total_sums, total_acc = _merge(total_m, total_sums, total_acc, m, sums, acc, scale_log2)
    _write(
        total_m,
        total_sums,
        total_acc,
        out_ptr,
        lse_ptr,
        token,
        head,
        position,
        num_tokens,
        scale_log2,
        NUM_HEADS,
        HEAD_DIM,
        BLOCK_DIM,
        WITH_LSE,
    )
