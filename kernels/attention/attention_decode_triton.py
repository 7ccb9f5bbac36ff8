"""Paged attention of few queries per request on the GPU, along a plan: the splits of all requests at once.

`_item_kernel` is persistent: its programs share out the plan's items times the KV heads. A request's only item is
written to the output; of several, the partials go to a workspace, and the program that finishes a request's last one
merges them in ascending order. With groups, `_group_kernel` goes first and attends to the shared prefixes: it leaves
finished partials for the splits that lie within, and for the split in which a prefix ends the state so far, from which
`_item_kernel` goes on. So each row's chain of operations, and its bits, are those of `_prefill_kernel`.
"""

import torch
import triton
import triton.language as tl

from lockstep.kernels._triton import begin_overlapped, launches_overlap
from lockstep.kernels.attention.attention_plan import GROUP_ROWS, AttentionPlan, load_item, split_range
from lockstep.kernels.attention.attention_triton import (
    KV_TILE,
    LOG2_E,
    SPLIT,
    _attend_split,
    _load_queries,
    _merge,
    _no_keys,
    _write,
)

# Rows of one request and KV head that fit a tile.
MAX_TILE_ROWS = 64
# Programs where there is no GPU: any number, but more than one and fewer than a test's items.
INTERPRETER_PROGRAMS = 3


def decode_forward(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    kv_lens: torch.Tensor,
    scale: float,
    plan: AttentionPlan,
) -> torch.Tensor:
    """`lockstep.kernels.attention.attention` along a plan, of max_queries * H // HKV <= MAX_TILE_ROWS."""
    q = q.detach()
    q = q if q.stride(2) == 1 else q.contiguous()
    num_tokens, num_heads, head_dim = q.shape
    _, num_kv_heads, page_size, _ = k_cache.shape
    if not (k_cache.is_contiguous() and v_cache.is_contiguous()):
        raise ValueError("the KV cache was not made by new_kv_cache")
    out = torch.empty((num_tokens, num_heads, head_dim), dtype=q.dtype, device=q.device)
    max_items = plan.items.shape[0]
    request_rows = plan.max_queries * (num_heads // num_kv_heads)
    shape = (max_items, num_kv_heads, request_rows)
    partial_max, partial_sum = torch.empty((2, *shape), dtype=torch.float32, device=q.device).unbind()
    partial = torch.empty((*shape, head_dim), dtype=torch.float32, device=q.device)
    inputs = (q, k_cache, v_cache, page_table, page_table.stride(0), q.stride(0), q.stride(1), scale * LOG2_E)
    workspace = (partial_max, partial_sum, partial)
    block_dim = max(16, triton.next_power_of_2(head_dim))
    overlap = launches_overlap(q.device)
    sizes = {
        "NUM_HEADS": num_heads,
        "NUM_KV_HEADS": num_kv_heads,
        "HEAD_DIM": head_dim,
        "BLOCK_DIM": block_dim,
        "PAGE_SIZE": page_size,
        "REQUEST_ROWS": request_rows,
        "SPLIT": SPLIT,
        "KV_TILE": KV_TILE,
        "WINDOW": plan.window or 0,
        "OVERLAP": overlap,
        "num_warps": 4,
        "launch_pdl": overlap,
    }
    max_units = max_items * num_kv_heads
    if plan.groups is not None:
        group_items = (plan.group_items, plan.counts, plan.groups.tiles, plan.groups.shared_lens)
        requests = (cu_seqlens_q, kv_lens, plan.first_slots)
        num_programs, num_stages = _pipeline(GROUP_ROWS, block_dim * q.element_size(), q.device)
        _group_kernel[(min(num_programs, max_units),)](
            *inputs, *group_items, *requests, *workspace, **sizes, TILE_ROWS=GROUP_ROWS, num_stages=num_stages
        )
    tile_rows = max(16, triton.next_power_of_2(request_rows))
    num_programs, num_stages = _pipeline(tile_rows, block_dim * q.element_size(), q.device)
    _item_kernel[(min(num_programs, max_units),)](
        *inputs,
        plan.items,
        plan.counts,
        plan.arrivals,
        *workspace,
        out,
        num_tokens,
        **sizes,
        TILE_ROWS=tile_rows,
        MERGE_ROWS=triton.next_power_of_2(request_rows),
        GROUPED=plan.groups is not None,
        num_stages=num_stages,
    )
    return out


def _pipeline(tile_rows: int, row_bytes: int, device: torch.device) -> tuple[int, int]:
    """(programs, KV tiles that each has in shared memory): what fits an SM and keeps its share of the bus busy."""
    if device.type != "cuda":
        return INTERPRETER_PROGRAMS, 1
    programs_per_sm = 3 if tile_rows == 16 and row_bytes <= 256 else 2
    num_stages = 4 if row_bytes <= 128 else 3 if row_bytes <= 256 and tile_rows < 64 else 2 if row_bytes <= 512 else 1
    return programs_per_sm * torch.cuda.get_device_properties(device).multi_processor_count, num_stages


@triton.jit
def _request_rows(
    first_token, num_queries, kv_len, kv_head, NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, ROWS: tl.constexpr
):
    """Of the rows of a request and KV head, in a tile of ROWS: token, head and position (-1: no such row)."""
    GROUP: tl.constexpr = NUM_HEADS // NUM_KV_HEADS
    row = tl.arange(0, ROWS)
    query = row // GROUP
    position = tl.where(query < num_queries, kv_len - num_queries + query, -1)
    return first_token + query, kv_head * GROUP + row % GROUP, position


@triton.jit(do_not_specialize=["num_tokens"])
def _item_kernel(
    q_ptr,
    k_cache_ptr,
    v_cache_ptr,
    page_table_ptr,
    page_table_stride,
    q_token_stride,
    q_head_stride,
    scale_log2,
    items_ptr,
    counts_ptr,
    arrivals_ptr,
    max_ptr,
    sum_ptr,
    acc_ptr,
    out_ptr,
    num_tokens,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    REQUEST_ROWS: tl.constexpr,
    SPLIT: tl.constexpr,
    KV_TILE: tl.constexpr,
    WINDOW: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    MERGE_ROWS: tl.constexpr,
    GROUPED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    begin_overlapped(OVERLAP)
    row = tl.arange(0, TILE_ROWS)
    d = tl.arange(0, BLOCK_DIM)
    # An item is loaded while the one before it is computed, the first together with the number of items.
    next_item = load_item(items_ptr, tl.program_id(0) // NUM_KV_HEADS)
    num_units = tl.load(counts_ptr) * NUM_KV_HEADS
    for unit in range(tl.program_id(0), num_units, tl.num_programs(0)):
        request, split, first_token, num_queries, kv_len, shared_len, first_slot = next_item
        next_item = load_item(items_ptr, tl.minimum(unit + tl.num_programs(0), num_units - 1) // NUM_KV_HEADS)
        kv_head = unit % NUM_KV_HEADS
        token, head, position = _request_rows(
            first_token, num_queries, kv_len, kv_head, NUM_HEADS, NUM_KV_HEADS, TILE_ROWS
        )
        first, first_own, end = split_range(kv_len, num_queries, shared_len, SPLIT, WINDOW)
        partial = ((first_slot + split - first).to(tl.int64) * NUM_KV_HEADS + kv_head) * REQUEST_ROWS + row
        exists = position >= 0
        mask = exists[:, None] & (d < HEAD_DIM)[None, :]
        q = _load_queries(q_ptr, token, head, position, q_token_stride, q_head_stride, HEAD_DIM, BLOCK_DIM)
        m, sums, acc = _no_keys(TILE_ROWS, BLOCK_DIM)
        begin = split * SPLIT
        if GROUPED:
            # The split in which the prefix ends was begun by `_group_kernel`.
            begun = tl.where(begin < shared_len, position, -1) >= 0
            m = tl.load(max_ptr + partial, mask=begun, other=float("-inf"))
            sums = tl.load(sum_ptr + partial, mask=begun, other=0.0)
            acc_mask = begun[:, None] & (d < HEAD_DIM)[None, :]
            acc = tl.load(acc_ptr + partial[:, None] * HEAD_DIM + d[None, :], mask=acc_mask, other=0.0)
            begin = tl.maximum(begin, shared_len)
        if WINDOW > 0:
            begin = tl.maximum(begin, (kv_len - num_queries - WINDOW + 1) // KV_TILE * KV_TILE)
        m, sums, acc = _attend_split(
            m,
            sums,
            acc,
            q,
            position,
            k_cache_ptr,
            v_cache_ptr,
            page_table_ptr + request.to(tl.int64) * page_table_stride,
            kv_head,
            begin,
            tl.minimum(split * SPLIT + SPLIT, kv_len),
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
        if end - first_own == 1:
            if GROUPED:
                # All splits before it are within the prefix: `_group_kernel` has finished them.
                before_m, before_sums, before_acc = _merge_slots(
                    first_slot,
                    first_own - first,
                    position,
                    kv_head,
                    max_ptr,
                    sum_ptr,
                    acc_ptr,
                    scale_log2,
                    NUM_KV_HEADS,
                    HEAD_DIM,
                    BLOCK_DIM,
                    REQUEST_ROWS,
                    TILE_ROWS,
                    2,
                )
                m, sums, acc = _merge(before_m, before_sums, before_acc, m, sums, acc, scale_log2)
            _write(
                m,
                sums,
                acc,
                out_ptr,
                out_ptr,
                token,
                head,
                position,
                num_tokens,
                scale_log2,
                NUM_HEADS,
                HEAD_DIM,
                BLOCK_DIM,
                WITH_LSE=False,
            )
        else:
            tl.store(max_ptr + partial, m, mask=exists)
            tl.store(sum_ptr + partial, sums, mask=exists)
            tl.store(acc_ptr + partial[:, None] * HEAD_DIM + d[None, :], acc, mask=mask)
            # All threads' partials are stored before the one that the atomic runs in tells of them.
            tl.debug_barrier()
            arrivals = arrivals_ptr + request * NUM_KV_HEADS + kv_head
            if tl.atomic_add(arrivals, 1, sem="acq_rel", scope="gpu") == end - first_own - 1:
                tl.store(arrivals, 0)
                _merge_splits(
                    first_token,
                    num_queries,
                    kv_len,
                    kv_head,
                    first_slot,
                    end - first,
                    max_ptr,
                    sum_ptr,
                    acc_ptr,
                    scale_log2,
                    out_ptr,
                    num_tokens,
                    NUM_HEADS,
                    NUM_KV_HEADS,
                    HEAD_DIM,
                    BLOCK_DIM,
                    REQUEST_ROWS,
                    MERGE_ROWS,
                )


@triton.jit
def _merge_splits(
    first_token,
    num_queries,
    kv_len,
    kv_head,
    first_slot,
    num_splits,
    max_ptr,
    sum_ptr,
    acc_ptr,
    scale_log2,
    out_ptr,
    num_tokens,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    REQUEST_ROWS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Merge all splits of one request and KV head in ascending order, and write the output."""
    # Partials in flight together: few where there are few, since those past the last one are computed for nothing.
    FEW: tl.constexpr = 4
    MANY: tl.constexpr = min(16, max(FEW, 64 // ROWS))
    token, head, position = _request_rows(first_token, num_queries, kv_len, kv_head, NUM_HEADS, NUM_KV_HEADS, ROWS)
    if num_splits <= FEW:
        m, sums, acc = _merge_slots(
            first_slot,
            num_splits,
            position,
            kv_head,
            max_ptr,
            sum_ptr,
            acc_ptr,
            scale_log2,
            NUM_KV_HEADS,
            HEAD_DIM,
            BLOCK_DIM,
            REQUEST_ROWS,
            ROWS,
            FEW,
        )
    else:
        m, sums, acc = _merge_slots(
            first_slot,
            num_splits,
            position,
            kv_head,
            max_ptr,
            sum_ptr,
            acc_ptr,
            scale_log2,
            NUM_KV_HEADS,
            HEAD_DIM,
            BLOCK_DIM,
            REQUEST_ROWS,
            ROWS,
            MANY,
        )
    _write(
        m,
        sums,
        acc,
        out_ptr,
        out_ptr,
        token,
        head,
        position,
        num_tokens,
        scale_log2,
        NUM_HEADS,
        HEAD_DIM,
        BLOCK_DIM,
        WITH_LSE=False,
    )


@triton.jit
def _merge_slots(
    first_slot,
    num_slots,
    position,
    kv_head,
    max_ptr,
    sum_ptr,
    acc_ptr,
    scale_log2,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    REQUEST_ROWS: tl.constexpr,
    ROWS: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """The total of the partials in consecutive slots, in ascending order; the loads of AT_ONCE are in flight together.

    They are read past the L1 cache (".cg"), which may hold what was there before other programs wrote them.
    """
    d = tl.arange(0, BLOCK_DIM)
    total_m, total_sums, total_acc = _no_keys(ROWS, BLOCK_DIM)
    for chunk in range(0, num_slots, AT_ONCE):
        for i in tl.static_range(AT_ONCE):
            # Past the last slot: the partial of no keys, which changes nothing.
            exists = tl.where(chunk + i < num_slots, position, -1) >= 0
            partial = ((first_slot + chunk + i).to(tl.int64) * NUM_KV_HEADS + kv_head) * REQUEST_ROWS + tl.arange(
                0, ROWS
            )
            m = tl.load(max_ptr + partial, mask=exists, other=float("-inf"), cache_modifier=".cg")
            sums = tl.load(sum_ptr + partial, mask=exists, other=0.0, cache_modifier=".cg")
            acc = tl.load(
                acc_ptr + partial[:, None] * HEAD_DIM + d[None, :],
                mask=exists[:, None] & (d < HEAD_DIM)[None, :],
                other=0.0,
                cache_modifier=".cg",
            )
            total_m, total_sums, total_acc = _merge(total_m, total_sums, total_acc, m, sums, acc, scale_log2)
    return total_m, total_sums, total_acc


@triton.jit
def _group_kernel(
    q_ptr,
    k_cache_ptr,
    v_cache_ptr,
    page_table_ptr,
    page_table_stride,
    q_token_stride,
    q_head_stride,
    scale_log2,
    group_items_ptr,
    counts_ptr,
    group_tiles_ptr,
    shared_lens_ptr,
    cu_seqlens_ptr,
    kv_lens_ptr,
    first_slots_ptr,
    max_ptr,
    sum_ptr,
    acc_ptr,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    REQUEST_ROWS: tl.constexpr,
    SPLIT: tl.constexpr,
    KV_TILE: tl.constexpr,
    WINDOW: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """The partials of the requests of a group tile in the shared part of a split."""
    begin_overlapped(OVERLAP)
    GROUP: tl.constexpr = NUM_HEADS // NUM_KV_HEADS
    row = tl.arange(0, TILE_ROWS)
    d = tl.arange(0, BLOCK_DIM)
    num_units = tl.load(counts_ptr + 1) * NUM_KV_HEADS
    for unit in range(tl.program_id(0), num_units, tl.num_programs(0)):
        kv_head = unit % NUM_KV_HEADS
        tile = tl.load(group_items_ptr + unit // NUM_KV_HEADS * 2)
        split = tl.load(group_items_ptr + unit // NUM_KV_HEADS * 2 + 1)
        first_request = tl.load(group_tiles_ptr + tile * 2)
        num_requests = tl.load(group_tiles_ptr + tile * 2 + 1)
        shared_len = tl.load(shared_lens_ptr + first_request)
        token = tl.load(cu_seqlens_ptr + first_request) + row // GROUP
        # Of each row its request: as many of the tile's requests as end at or before its token come before it.
        ends = tl.load(cu_seqlens_ptr + first_request + 1 + row, mask=row < num_requests, other=1 << 30)
        request = first_request + tl.sum((ends[None, :] <= token[:, None]).to(tl.int32), 1)
        exists = request < first_request + num_requests
        begin = tl.load(cu_seqlens_ptr + request, mask=exists, other=0)
        end = tl.load(cu_seqlens_ptr + request + 1, mask=exists, other=0)
        kv_len = tl.load(kv_lens_ptr + request, mask=exists, other=0)
        position = tl.where(exists, kv_len - end + token, -1)
        head = kv_head * GROUP + row % GROUP
        q = _load_queries(q_ptr, token, head, position, q_token_stride, q_head_stride, HEAD_DIM, BLOCK_DIM)
        m, sums, acc = _no_keys(TILE_ROWS, BLOCK_DIM)
        m, sums, acc = _attend_split(
            m,
            sums,
            acc,
            q,
            position,
            k_cache_ptr,
            v_cache_ptr,
            page_table_ptr + first_request.to(tl.int64) * page_table_stride,
            kv_head,
            split * SPLIT,
            tl.minimum(split * SPLIT + SPLIT, shared_len),
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
        first, _, _ = split_range(kv_len, end - begin, shared_len, SPLIT, WINDOW)
        # A request whose window begins behind this split has no slot for it.
        exists = (position >= 0) & (split >= first)
        slot = tl.load(first_slots_ptr + request, mask=exists, other=0) + split - first
        partial = (slot.to(tl.int64) * NUM_KV_HEADS + kv_head) * REQUEST_ROWS
        partial += (token - begin) * GROUP + row % GROUP
        tl.store(max_ptr + partial, m, mask=exists)
        tl.store(sum_ptr + partial, sums, mask=exists)
        acc_mask = exists[:, None] & (d < HEAD_DIM)[None, :]
        tl.store(acc_ptr + partial[:, None] * HEAD_DIM + d[None, :], acc, mask=acc_mask)
