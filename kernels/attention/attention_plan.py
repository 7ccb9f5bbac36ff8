"""The work of one decode step's attention, cut into items on the GPU: made once a step, used by every layer.

An item is a split of one request that its queries see; see attention_triton.py for splits. A launch over items costs
what the batch costs, whatever the lengths could have been. Requests whose page tables begin with the same pages may be
given as groups: a group item is a split of their shared prefix, attended to by all their rows together.
"""

from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import ArrayLike

from lockstep.kernels.attention.attention_triton import KV_TILE, SPLIT

# Rows (request, query, head of a KV group) that a group tile may have.
GROUP_ROWS = 64


class Groups(NamedTuple):
    """Which requests share a prefix. All tensors are int32, on the device; an unused tail may hold anything.

    A tile is a run of consecutive requests with the same first `shared_lens` tokens on the same pages, and at most
    GROUP_ROWS rows: queries times heads per KV head. A group with more rows has several tiles. Every request with
    shared_lens > 0 is in one tile.
    """

    shared_lens: torch.Tensor  # [B], a multiple of KV_TILE, at most kv_len - number of queries; 0: shares nothing
    tiles: torch.Tensor  # [G, 2] first request, number of requests
    num_tiles: torch.Tensor  # [1]


class AttentionPlan(NamedTuple):
    """From `plan_attention`; its tensors are of use to the attention kernels only."""

    items: torch.Tensor  # [max_items, 8] int32, see `load_item`
    group_items: torch.Tensor  # [max_items, 2] int32: group tile, split
    counts: torch.Tensor  # [2] int32: items, group items
    first_slots: torch.Tensor  # [B] int32: the workspace slot of a request's first visible split; the others follow
    arrivals: torch.Tensor  # [B, HKV] int32, zero between launches: items of the request that are done
    groups: Groups | None
    max_queries: int
    window: int | None


def num_attention_items(kv_lens: ArrayLike) -> int:
    """On the host: a `max_items` that serves requests of these lengths, however they are grouped or windowed."""
    return int((-(-np.asarray(kv_lens) // SPLIT)).sum())


def plan_attention(
    kv_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    num_kv_heads: int,
    max_items: int,
    max_queries: int = 1,
    window: int | None = None,
    groups: Groups | None = None,
) -> AttentionPlan:
    """Plan the attention of requests with few queries each; on a GPU, in one launch that a CUDA graph may capture.

        items = [(b, s) for b in range(B) for s in range(max(low(b), shared_lens[b]) // SPLIT, cdiv(kv_lens[b], SPLIT))]
                                       # low(b): the first position that any query of b sees; full splits come first
        group_items = [(g, s) for g in range(num_tiles) for s in range(cdiv(shared_lens[tiles[g, 0]], SPLIT))]

    kv_lens [B] and cu_seqlens_q [B + 1] are those of `attention`, int32; a request with kv_len 0 or no queries is
    padding, and what `attention` returns for its rows is undefined. max_items: the workspace of `attention` is in
    proportion; if it is less than `num_attention_items`, nothing is attended to. max_queries: the most of a request.
    The same plan serves layers with the same KV heads and window, on the same tensors. Raises ValueError for a group
    tensor that does not fit.
    """
    num_requests, device = kv_lens.shape[0], kv_lens.device
    if groups is not None and (groups.shared_lens.shape != kv_lens.shape or groups.tiles.shape[1:] != (2,)):
        raise ValueError(
            f"plan_attention: shared_lens {list(groups.shared_lens.shape)} or tiles {list(groups.tiles.shape)} does "
            f"not fit {num_requests} requests"
        )
    block_requests = triton.next_power_of_2(num_requests)
    plan = AttentionPlan(
        items=torch.empty((max_items, 8), dtype=torch.int32, device=device),
        group_items=torch.empty((max_items if groups else 0, 2), dtype=torch.int32, device=device),
        counts=torch.empty(2, dtype=torch.int32, device=device),
        first_slots=torch.empty(num_requests, dtype=torch.int32, device=device),
        arrivals=torch.empty((num_requests, num_kv_heads), dtype=torch.int32, device=device),
        groups=groups,
        max_queries=max_queries,
        window=window,
    )
    # Without groups the kernel does not read these three, but it wants some tensors there.
    shared_lens, tiles, num_tiles = groups or (kv_lens, kv_lens, kv_lens)
    _plan_kernel[(1,)](
        kv_lens,
        cu_seqlens_q,
        shared_lens,
        tiles,
        num_tiles,
        plan.items,
        plan.group_items,
        plan.counts,
        plan.first_slots,
        plan.arrivals,
        num_requests,
        max_items,
        NUM_KV_HEADS=num_kv_heads,
        BLOCK_REQUESTS=block_requests,
        BLOCK_GROUPS=triton.next_power_of_2(tiles.shape[0]),
        SPLIT=SPLIT,
        KV_TILE=KV_TILE,
        WINDOW=window or 0,
        GROUPED=groups is not None,
        num_warps=min(16, max(1, block_requests // 32)),
    )
    return plan


@triton.jit
def split_range(kv_len, num_queries, shared_len, SPLIT: tl.constexpr, WINDOW: tl.constexpr):
    """The first split that a query of the request sees, the first with keys of its own, and the end of both."""
    first = tl.maximum(kv_len - num_queries - WINDOW + 1, 0) // SPLIT if WINDOW > 0 else kv_len * 0
    return first, tl.maximum(first, shared_len // SPLIT), tl.cdiv(kv_len, SPLIT)


@triton.jit
def load_item(items_ptr, item):
    """(request, split, first token, number of queries, kv_len, shared_len, workspace slot of the first split)."""
    item_ptr = items_ptr + item * 8
    return (
        tl.load(item_ptr),
        tl.load(item_ptr + 1),
        tl.load(item_ptr + 2),
        tl.load(item_ptr + 3),
        tl.load(item_ptr + 4),
        tl.load(item_ptr + 5),
        tl.load(item_ptr + 6),
    )


@triton.jit
def _store_items(items_ptr, item, mask, request, split, first_token, num_queries, kv_len, shared_len, first_slot):
    item_ptrs = items_ptr + item * 8
    tl.store(item_ptrs, request, mask=mask)
    tl.store(item_ptrs + 1, split, mask=mask)
    tl.store(item_ptrs + 2, first_token, mask=mask)
    tl.store(item_ptrs + 3, num_queries, mask=mask)
    tl.store(item_ptrs + 4, kv_len, mask=mask)
    tl.store(item_ptrs + 5, shared_len, mask=mask)
    tl.store(item_ptrs + 6, first_slot, mask=mask)


@triton.jit
def _plan_kernel(
    kv_lens_ptr,
    cu_seqlens_ptr,
    shared_lens_ptr,
    group_tiles_ptr,
    num_group_tiles_ptr,
    items_ptr,
    group_items_ptr,
    counts_ptr,
    first_slots_ptr,
    arrivals_ptr,
    num_requests,
    max_items,
    NUM_KV_HEADS: tl.constexpr,
    BLOCK_REQUESTS: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    SPLIT: tl.constexpr,
    KV_TILE: tl.constexpr,
    WINDOW: tl.constexpr,
    GROUPED: tl.constexpr,
):
    request = tl.arange(0, BLOCK_REQUESTS)
    exists = request < num_requests
    kv_len = tl.load(kv_lens_ptr + request, mask=exists, other=0)
    first_token = tl.load(cu_seqlens_ptr + request, mask=exists, other=0)
    num_queries = tl.load(cu_seqlens_ptr + request + 1, mask=exists, other=0) - first_token
    kv_len = tl.where(num_queries > 0, kv_len, 0)
    shared_len = kv_len * 0
    if GROUPED:
        shared_len = tl.load(shared_lens_ptr + request, mask=kv_len > 0, other=0)
    first, first_own, end = split_range(kv_len, num_queries, shared_len, SPLIT, WINDOW)
    num_items = end - first_own
    num_slots = tl.where((end - first > 1) | (shared_len > 0), end - first, 0)
    fits = tl.maximum(tl.sum(num_items, 0), tl.sum(num_slots, 0)) <= max_items
    num_items = tl.where(fits, num_items, 0)
    tl.store(counts_ptr, tl.sum(num_items, 0))
    first_slot = tl.cumsum(num_slots, 0) - num_slots
    tl.store(first_slots_ptr + request, first_slot, mask=exists)
    for kv_head in range(NUM_KV_HEADS):
        tl.store(arrivals_ptr + request * NUM_KV_HEADS + kv_head, 0, mask=exists)

    # The last split of each request is the only one that is not nearly full: all others first, then the heaviest.
    num_others = tl.maximum(num_items - 1, 0)
    first_other = tl.cumsum(num_others, 0) - num_others
    for i in range(tl.max(num_others, 0)):
        _store_items(
            items_ptr,
            first_other + i,
            i < num_others,
            request,
            first_own + i,
            first_token,
            num_queries,
            kv_len,
            shared_len,
            first_slot,
        )
    last_begin = tl.maximum((end - 1) * SPLIT, shared_len)
    if WINDOW > 0:
        last_begin = tl.maximum(last_begin, kv_len - num_queries - WINDOW + 1)
    num_tiles = tl.cdiv(kv_len, KV_TILE) - last_begin // KV_TILE
    next_item = tl.sum(num_others, 0)
    item = num_tiles * 0
    for lightness in tl.static_range(SPLIT // KV_TILE):
        chosen = ((num_items > 0) & (num_tiles == SPLIT // KV_TILE - lightness)).to(tl.int32)
        item += chosen * (next_item + tl.cumsum(chosen, 0) - 1)
        next_item += tl.sum(chosen, 0)
    _store_items(
        items_ptr,
        item,
        num_items > 0,
        request,
        end - 1,
        first_token,
        num_queries,
        kv_len,
        shared_len,
        first_slot,
    )

    if GROUPED:
        group = tl.arange(0, BLOCK_GROUPS)
        exists = group < tl.load(num_group_tiles_ptr)
        first_request = tl.load(group_tiles_ptr + group * 2, mask=exists, other=0)
        num_shared = tl.cdiv(tl.load(shared_lens_ptr + first_request, mask=exists, other=0), SPLIT)
        first_item = tl.cumsum(num_shared, 0) - num_shared
        num_shared = tl.where(fits & (tl.sum(num_shared, 0) <= max_items), num_shared, 0)
        tl.store(counts_ptr + 1, tl.sum(num_shared, 0))
        for split in range(tl.max(num_shared, 0)):
            item_ptrs = group_items_ptr + (first_item + split) * 2
            tl.store(item_ptrs, group, mask=split < num_shared)
            tl.store(item_ptrs + 1, split, mask=split < num_shared)
