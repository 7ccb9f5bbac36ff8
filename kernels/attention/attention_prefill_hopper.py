"""Prefill attention for Hopper GPUs in Gluon, with the bits of `attention_triton._prefill_kernel`.

A program has three roles. One warp copies queries, keys and values to shared memory; two warpgroups compute, 64 query
rows each. While a warpgroup takes the softmax of a KV tile, its tensor cores multiply weights and values of the tile
before and compute the scores of the tile behind. A program stays on its multiprocessor and walks a fixed list of work
items, late queries first. A work item is 128 query rows of one request and one KV head; a row is (token, head of the
group), and the group is padded to a power of two.

The numerics are those described in attention_triton: a split starts afresh, splits are merged in ascending order, and
row sums are products with ones. Only tiles with keys that some row does not see are masked, which changes no bit.

KV tiles travel in steps, through a ring of STAGES slots. An item of n tiles takes n + 2 steps: step i brings the keys
of tile i and the values of tile i - 2, which the tensor cores need beside the softmax of tile i - 1.
"""

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

KV_TILE = gl.constexpr(64)
ROWS = gl.constexpr(64)  # of a warpgroup
TILE_ROWS = gl.constexpr(128)
STAGES = gl.constexpr(4)
SUM_COLUMNS = gl.constexpr(8)
HEAD_DIMS = (64, 128)
DTYPES = (torch.bfloat16, torch.float16)
# Registers of a thread: a multiprocessor's 65536 over 12 warps (the producer's counts as 4), and the producer's few.
REGISTERS = 168
PRODUCER_REGISTERS = gl.constexpr(24)
CONSUMER_REGISTERS = gl.constexpr(240)


def supports(q: torch.Tensor, k_cache: torch.Tensor, window: int | None) -> bool:
    """Whether `prefill` has a kernel for these arguments of `attention_triton.attention_forward`."""
    _, num_kv_heads, page_size, head_dim = k_cache.shape
    return (
        window is None
        and page_size == KV_TILE.value
        and head_dim in HEAD_DIMS
        and q.dtype in DTYPES
        and q.shape[1] // num_kv_heads <= ROWS.value
        and torch.cuda.get_device_capability(q.device)[0] == 9
    )


def prefill(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    kv_lens: torch.Tensor,
    scale_log2: float,
    split: int,
    out: torch.Tensor,
    lse: torch.Tensor | None,
) -> None:
    """Fill out [T, H, D] and, if given, lse [H, T] fp32. split: keys in a split. Nothing waits for the GPU."""
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads, num_requests = k_cache.shape[1], kv_lens.shape[0]
    group = triton.next_power_of_2(num_heads // num_kv_heads)
    if q.data_ptr() % 16 or any(stride * q.element_size() % 16 for stride in q.stride()[:2]):
        q = q.clone(memory_format=torch.contiguous_format)
    queries = TensorDescriptor.from_tensor(
        q, [ROWS.value // group, group, head_dim], gl.NVMMASharedLayout(128, 16, rank=3)
    )
    keys, values = (
        TensorDescriptor.from_tensor(
            cache.view(-1, head_dim), [KV_TILE.value, head_dim], gl.NVMMASharedLayout(128, 16, rank=2)
        )
        for cache in (k_cache, v_cache)
    )
    num_items = (num_tokens * group // TILE_ROWS.value + num_requests) * num_kv_heads
    num_programs = min(num_items, torch.cuda.get_device_properties(q.device).multi_processor_count)
    _prefill_kernel[(num_programs,)](
        queries,
        keys,
        values,
        page_table,
        page_table.stride(0),
        cu_seqlens_q,
        kv_lens,
        num_requests,
        num_items,
        scale_log2,
        out,
        out if lse is None else lse,
        num_tokens,
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        BLOCK_REQUESTS=max(32, triton.next_power_of_2(num_requests)),
        SPLIT_TILES=split // KV_TILE.value,
        WITH_LSE=lse is not None,
        num_warps=4,
        maxnreg=REGISTERS,
    )


@gluon.jit(do_not_specialize=["page_table_stride", "num_requests", "num_items", "num_tokens"])
def _prefill_kernel(
    queries,
    keys,
    values,
    page_table_ptr,
    page_table_stride,
    cu_seqlens_ptr,
    kv_lens_ptr,
    num_requests,
    num_items,
    scale_log2,
    out_ptr,
    lse_ptr,
    num_tokens,
    NUM_HEADS: gl.constexpr,
    NUM_KV_HEADS: gl.constexpr,
    BLOCK_REQUESTS: gl.constexpr,
    SPLIT_TILES: gl.constexpr,
    WITH_LSE: gl.constexpr,
):
    GROUP: gl.constexpr = queries.block_shape[1]
    HEAD_DIM: gl.constexpr = keys.block_shape[1]
    dtype: gl.constexpr = keys.dtype
    q_tiles = gl.allocate_shared_memory(dtype, [2, ROWS, HEAD_DIM], keys.layout)
    k_tiles = gl.allocate_shared_memory(dtype, [STAGES, KV_TILE, HEAD_DIM], keys.layout)
    v_tiles = gl.allocate_shared_memory(dtype, [STAGES, KV_TILE, HEAD_DIM], keys.layout)
    ones_layout: gl.constexpr = gl.BlockedLayout([1, SUM_COLUMNS], [32, 1], [4, 1], [1, 0])
    ones = gl.allocate_shared_memory(
        dtype,
        [KV_TILE, SUM_COLUMNS],
        gl.NVMMASharedLayout(0, 16, rank=2),
        gl.full([KV_TILE, SUM_COLUMNS], 1.0, dtype, ones_layout),
    )
    # The merged splits of each warpgroup: between merges they would only take registers.
    totals = gl.allocate_shared_memory(gl.float32, [2, ROWS, HEAD_DIM], gl.SwizzledSharedLayout(8, 1, 4, [1, 0]))
    q_barriers = _new_barriers(2, 1)
    kv_barriers = _new_barriers(STAGES, 2)
    fence_async_shared()

    places = (cu_seqlens_ptr, kv_lens_ptr, num_requests, num_items)
    tiles = (q_tiles, k_tiles, v_tiles)
    barriers = (q_barriers, kv_barriers)
    outputs = (out_ptr, lse_ptr, num_tokens)
    sizes: gl.constexpr = (NUM_HEADS, NUM_KV_HEADS, GROUP, BLOCK_REQUESTS)
    gl.warp_specialize(
        [
            (_consume, (0, places, tiles, ones, totals, barriers, outputs, scale_log2, sizes, SPLIT_TILES, WITH_LSE)),
            (_consume, (1, places, tiles, ones, totals, barriers, outputs, scale_log2, sizes, SPLIT_TILES, WITH_LSE)),
            (_produce, (places, (queries, keys, values), page_table_ptr, page_table_stride, tiles, barriers, sizes)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )


@gluon.jit
def _new_barriers(SLOTS: gl.constexpr, CONSUMERS: gl.constexpr):
    """Per slot of a ring, the barrier that says its tile has arrived and the one that says all consumers are done."""
    ready = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(SLOTS):
        mbarrier.init(ready.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=CONSUMERS)
    return ready, empty


@gluon.jit
def _locate(turn, places, sizes: gl.constexpr):
    """The program's work item of this turn: (request, KV head, first token, end of the request's tokens, kv_len, number
    of KV tiles), the last 0 where there is no such item.

    Request r owns the query tiles from cu_seqlens[r] * GROUP // TILE_ROWS + r on, which are as many as it needs or one
    more. The costs of items mostly fall, so every other turn goes through the programs backwards.
    """
    cu_seqlens_ptr, kv_lens_ptr, num_requests, num_items = places
    NUM_KV_HEADS: gl.constexpr = sizes[1]
    GROUP: gl.constexpr = sizes[2]
    BLOCK_REQUESTS: gl.constexpr = sizes[3]
    TILE_TOKENS: gl.constexpr = TILE_ROWS // GROUP
    program, num_programs = gl.program_id(0), gl.num_programs(0)
    item = turn * num_programs + gl.where(turn % 2 == 0, program, num_programs - 1 - program)
    tile = (num_items - 1 - item) // NUM_KV_HEADS
    requests = gl.arange(0, BLOCK_REQUESTS, gl.BlockedLayout([BLOCK_REQUESTS // 32], [32], [gl.num_warps()], [0]))
    begins = gl.load(cu_seqlens_ptr + requests, mask=requests < num_requests, other=0)
    owns = (begins // TILE_TOKENS + requests <= tile) & (requests < num_requests)
    request = gl.maximum(gl.sum(owns.to(gl.int32), 0) - 1, 0)
    begin = gl.load(cu_seqlens_ptr + request)
    end = gl.load(cu_seqlens_ptr + request + 1)
    kv_len = gl.load(kv_lens_ptr + request)
    first_token = begin + (tile - begin // TILE_TOKENS - request) * TILE_TOKENS
    last_token = gl.minimum(first_token + TILE_TOKENS, end) - 1
    exists = (item < num_items) & (first_token < end)
    num_kv_tiles = gl.where(exists, (kv_len - end + last_token) // KV_TILE + 1, 0)
    return request, item % NUM_KV_HEADS, first_token, end, kv_len, num_kv_tiles


@gluon.jit
def _num_turns(places):
    return gl.cdiv(places[3], gl.num_programs(0))


@gluon.jit
def _produce(places, sources, page_table_ptr, page_table_stride, tiles, barriers, sizes: gl.constexpr):
    """Copy the queries and the KV steps of every work item."""
    queries, keys, values = sources
    q_tiles, k_tiles, v_tiles = tiles
    q_barriers, kv_barriers = barriers
    q_ready, q_empty = q_barriers
    kv_ready, kv_empty = kv_barriers
    NUM_KV_HEADS: gl.constexpr = sizes[1]
    REAL_GROUP: gl.constexpr = sizes[0] // NUM_KV_HEADS
    TILE_BYTES: gl.constexpr = keys.block_type.nbytes
    items_done = 0
    step = 0
    for turn in range(_num_turns(places)):
        request, kv_head, first_token, _end, _kv_len, num_kv_tiles = _locate(turn, places, sizes)
        if num_kv_tiles > 0:
            for w in gl.static_range(2):
                mbarrier.wait(q_empty.index(w), (items_done & 1) ^ 1)
                mbarrier.expect(q_ready.index(w), queries.block_type.nbytes)
                tma.async_copy_global_to_shared(
                    queries,
                    [first_token + w * queries.block_shape[0], kv_head * REAL_GROUP, 0],
                    q_ready.index(w),
                    q_tiles.index(w)._reinterpret(queries.dtype, queries.block_shape, queries.layout),
                )
            items_done += 1
            pages_ptr = page_table_ptr + request.to(gl.int64) * page_table_stride
            v_page = 0
            middle_page = 0
            k_page = gl.load(pages_ptr)
            for k_tile in range(num_kv_tiles + 2):
                next_page = gl.load(pages_ptr + gl.minimum(k_tile + 1, num_kv_tiles - 1))
                slot = step % STAGES
                ready = kv_ready.index(slot)
                has_k = k_tile < num_kv_tiles
                has_v = k_tile >= 2
                mbarrier.wait(kv_empty.index(slot), (step // STAGES & 1) ^ 1)
                mbarrier.expect(ready, 2 * TILE_BYTES, pred=has_k & has_v)
                mbarrier.expect(ready, TILE_BYTES, pred=has_k ^ has_v)
                mbarrier.arrive(ready, pred=(k_tile == 1) & (num_kv_tiles == 1))  # a step that brings nothing
                k_row = (k_page * NUM_KV_HEADS + kv_head) * KV_TILE
                v_row = (v_page * NUM_KV_HEADS + kv_head) * KV_TILE
                tma.async_copy_global_to_shared(keys, [k_row, 0], ready, k_tiles.index(slot), pred=has_k)
                tma.async_copy_global_to_shared(values, [v_row, 0], ready, v_tiles.index(slot), pred=has_v)
                step += 1
                v_page = middle_page
                middle_page = k_page
                k_page = next_page


@gluon.jit
def _wait_for_step(barriers, step):
    """step: counted over all items of the program."""
    mbarrier.wait(barriers[0].index(step % STAGES), step // STAGES & 1)


@gluon.jit
def _release_step(barriers, step):
    mbarrier.arrive(barriers[1].index(step % STAGES))


@gluon.jit
def _consume(
    w: gl.constexpr,
    places,
    tiles,
    ones,
    totals,
    barriers,
    outputs,
    scale_log2,
    sizes: gl.constexpr,
    SPLIT_TILES: gl.constexpr,
    WITH_LSE: gl.constexpr,
):
    """Warpgroup w's half of every work item."""
    q_tiles, k_tiles, v_tiles = tiles
    q_barriers, kv_barriers = barriers
    q_ready, q_empty = q_barriers
    q = q_tiles.index(w)
    total = totals.index(w)
    GROUP: gl.constexpr = sizes[2]
    HEAD_DIM: gl.constexpr = q.shape[1]
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KV_TILE, 16])
    sum_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SUM_COLUMNS, 16])
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, acc_layout, 2)
    rows: gl.constexpr = gl.SliceLayout(1, score_layout)

    items_done = 0
    step = 0
    for turn in range(_num_turns(places)):
        _request, kv_head, first_token, end, kv_len, num_kv_tiles = _locate(turn, places, sizes)
        if num_kv_tiles > 0:
            first_token += w * (ROWS // GROUP)
            first_position = kv_len - end + first_token
            position = first_position + gl.arange(0, ROWS, layout=rows) // GROUP
            last = num_kv_tiles - 1

            mbarrier.wait(q_ready.index(w), items_done & 1)
            _wait_for_step(kv_barriers, step)
            scores = warpgroup_mma_wait(0, [_start_scores(q, k_tiles, step, score_layout)])
            _release_step(kv_barriers, step)
            # Where there is no second tile, these are scores of whatever the slot holds, and unused.
            _wait_for_step(kv_barriers, step + 1)
            next_scores = _start_scores(q, k_tiles, step + 1, score_layout)
            m = gl.full([ROWS], float("-inf"), gl.float32, rows)
            weights, m, _ = _softmax(0, scores, m, position, scale_log2, q.dtype, True)
            _wait_for_step(kv_barriers, step + 2)
            scores = warpgroup_mma_wait(0, [next_scores])
            _release_step(kv_barriers, step + 1)

            total_m = gl.full([ROWS], float("-inf"), gl.float32, rows)
            sums = gl.zeros([ROWS, SUM_COLUMNS], gl.float32, sum_layout)
            acc = gl.zeros([ROWS, HEAD_DIM], gl.float32, acc_layout)
            state = (scores, gl.convert_layout(weights, p_layout), m, sums, acc, total_m, sums)
            context = (q, k_tiles, v_tiles, ones, total, kv_barriers, step + 1, position, scale_log2)
            first_masked = gl.maximum(gl.minimum((first_position + 1) // KV_TILE, last), 1)
            # Two at a time, so that the scores need not move to other registers.
            pairs_end = 1 + (first_masked - 1) // 2 * 2
            for tile in range(1, pairs_end, 2):
                state = _step(tile, state, context, SPLIT_TILES, False, True)
                state = _step(tile + 1, state, context, SPLIT_TILES, False, True)
            for tile in range(pairs_end, first_masked):
                state = _step(tile, state, context, SPLIT_TILES, False, True)
            for tile in range(first_masked, last):
                state = _step(tile, state, context, SPLIT_TILES, True, True)
            mbarrier.arrive(q_empty.index(w))
            if last > 0:
                state = _step(last, state, context, SPLIT_TILES, True, False)
            scores, p, m, sums, acc, total_m, total_sums = state

            step += num_kv_tiles + 1
            v = v_tiles.index(step % STAGES)
            if num_kv_tiles * KV_TILE > kv_len:
                _clear_behind(v, kv_len - last * KV_TILE)
            acc = warpgroup_mma(p, v, acc, is_async=True)
            sums = warpgroup_mma(p, ones, sums, is_async=True)
            acc, sums, p = warpgroup_mma_wait(0, [acc, sums, p])
            _release_step(kv_barriers, step)
            step += 1
            items_done += 1
            if num_kv_tiles > SPLIT_TILES:
                m, sums, acc = _merge(total_m, total_sums, total.load(acc_layout), m, sums, acc, scale_log2)
            _write(m, sums, acc, total, first_token, end, kv_head, outputs, scale_log2, sizes, WITH_LSE)


@gluon.jit
def _start_scores(q, k_tiles, step, layout: gl.constexpr):
    k = k_tiles.index(step % STAGES).permute((1, 0))
    return warpgroup_mma(q, k, gl.zeros([ROWS, KV_TILE], gl.float32, layout), use_acc=False, is_async=True)


@gluon.jit
def _softmax(tile, scores, m, position, scale_log2, dtype: gl.constexpr, MASKED: gl.constexpr):
    """The weights of a tile, the new maximum, and the factor by which sums and acc of the tiles before it shrink."""
    if MASKED:
        key = tile * KV_TILE + gl.arange(0, KV_TILE, gl.SliceLayout(0, scores.type.layout))
        scores = gl.where(key[None, :] <= position[:, None], scores, float("-inf"))
    new_m = gl.maximum(m, gl.max(scores, 1))
    finite_m = gl.where(new_m == float("-inf"), 0.0, new_m)
    weights = gl.exp2(gl.fma(scores, scale_log2, -(finite_m * scale_log2)[:, None])).to(dtype)
    return weights, new_m, gl.exp2((m - finite_m) * scale_log2)


@gluon.jit
def _step(tile, state, context, SPLIT_TILES: gl.constexpr, MASKED: gl.constexpr, HAS_NEXT: gl.constexpr):
    """Take the softmax of a tile while the tensor cores work on the values of the tile before it, whose weights are p,
    and, if HAS_NEXT, on the scores of the tile behind it. Its step has arrived; the next one will have.
    """
    scores, p, m, sums, acc, total_m, total_sums = state
    q, k_tiles, v_tiles, ones, total, barriers, step, position, scale_log2 = context
    step += tile
    score_layout: gl.constexpr = scores.type.layout
    dtype: gl.constexpr = q.dtype
    acc = warpgroup_mma(p, v_tiles.index(step % STAGES), acc, is_async=True)
    sums = warpgroup_mma(p, ones, sums, is_async=True)
    next_scores = scores
    if HAS_NEXT:
        next_scores = _start_scores(q, k_tiles, step, score_layout)

    starts_split = tile % SPLIT_TILES == 0
    old_m = gl.where(starts_split, float("-inf"), m)
    weights, new_m, shrink = _softmax(tile, scores, old_m, position, scale_log2, dtype, MASKED)
    # The compilers would move the softmax behind the next wait for the tensor cores and lose the overlap: hence the
    # wait for the next step's tiles before it, and the weights in it.
    _wait_for_step(barriers, step + 1)
    acc, sums, p, weights = warpgroup_mma_wait(1 if HAS_NEXT else 0, [acc, sums, p, weights])
    if starts_split:
        total_acc = gl.where(tile == SPLIT_TILES, 0.0, total.load(acc.type.layout))
        total_m, total_sums, total_acc = _merge(total_m, total_sums, total_acc, m, sums, acc, scale_log2)
        total.store(total_acc)
        sums = gl.zeros_like(sums)
        acc = gl.zeros_like(acc)
    else:
        sums = sums * _per_row(shrink, sums)
        acc = acc * _per_row(shrink, acc)
    if HAS_NEXT:
        next_scores = warpgroup_mma_wait(0, [next_scores])
    _release_step(barriers, step)
    return next_scores, gl.convert_layout(weights, p.type.layout), new_m, sums, acc, total_m, total_sums


@gluon.jit
def _per_row(x, like):
    """x, one value a row, as a column beside `like`."""
    return gl.convert_layout(x, gl.SliceLayout(1, like.type.layout))[:, None]


@gluon.jit
def _merge(total_m, total_sums, total_acc, m, sums, acc, scale_log2):
    """`attention_triton._merge`; sums has several equal columns."""
    new_m = gl.maximum(total_m, m)
    finite_m = gl.where(new_m == float("-inf"), 0.0, new_m)
    old = gl.exp2((total_m - finite_m) * scale_log2)
    new = gl.exp2((m - finite_m) * scale_log2)
    sums = gl.fma(total_sums, _per_row(old, sums), sums * _per_row(new, sums))
    acc = gl.fma(total_acc, _per_row(old, acc), acc * _per_row(new, acc))
    return new_m, sums, acc


@gluon.jit
def _clear_behind(v, num_keys):
    """Zero the values behind the request's last key: they may be NaN, and a weight of 0 would not hide that.

    Both warpgroups do this, and write the same.
    """
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // v.shape[1], v.shape[1] // 8], [4, 1], [1, 0])
    key = gl.arange(0, KV_TILE, gl.SliceLayout(1, layout))
    v.store(gl.where((key < num_keys)[:, None], v.load(layout), 0.0))
    fence_async_shared()
    gl.thread_barrier()


@gluon.jit
def _write(
    m, sums, acc, memory, first_token, end, kv_head, outputs, scale_log2, sizes: gl.constexpr, WITH_LSE: gl.constexpr
):
    out_ptr, lse_ptr, num_tokens = outputs
    NUM_HEADS: gl.constexpr = sizes[0]
    HEAD_DIM: gl.constexpr = acc.shape[1]
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HEAD_DIM, HEAD_DIM // 8], [4, 1], [1, 0])
    rows: gl.constexpr = gl.SliceLayout(1, layout)
    sums = gl.max(sums, 1)
    out = (acc / _per_row(sums, acc)).to(out_ptr.dtype.element_ty)
    token, head, exists = _place_rows(first_token, end, kv_head, rows, sizes)
    d = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, layout))
    offsets = (token.to(gl.int64) * NUM_HEADS + head) * HEAD_DIM
    memory = memory._reinterpret(out.dtype, [ROWS, HEAD_DIM], gl.NVMMASharedLayout(128, 16, rank=2))
    memory.store(out)
    gl.store(out_ptr + offsets[:, None] + d[None, :], memory.load(layout), mask=exists[:, None])
    if WITH_LSE:
        lse_layout: gl.constexpr = m.type.layout
        token, head, exists = _place_rows(first_token, end, kv_head, lse_layout, sizes)
        lse = (m * scale_log2 + gl.log2(gl.convert_layout(sums, lse_layout))) * 0.6931471805599453
        gl.store(lse_ptr + head.to(gl.int64) * num_tokens + token, lse, mask=exists)


@gluon.jit
def _place_rows(first_token, end, kv_head, layout: gl.constexpr, sizes: gl.constexpr):
    """Token and head of a warpgroup's rows, and whether there are such."""
    REAL_GROUP: gl.constexpr = sizes[0] // sizes[1]
    GROUP: gl.constexpr = sizes[2]
    row = gl.arange(0, ROWS, layout)
    token = first_token + row // GROUP
    return token, kv_head * REAL_GROUP + row % GROUP, (token < end) & (row % GROUP < REAL_GROUP)
