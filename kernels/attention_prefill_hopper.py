"""Prefill attention for Hopper GPUs in Gluon, with the bits of `attention_triton._prefill_kernel`.

A program has three roles. One warp copies queries and KV tiles to shared memory (TMA); two warpgroups compute, 64 query
rows each. A warpgroup starts the scores of the next KV tile before the softmax of the current one, so that its tensor
cores work meanwhile. Programs stay on their multiprocessor and walk a fixed list of work items, late queries first: a
work item is 128 query rows of one request and one KV head; a row is (token, head of the group), and the group is padded
to a power of two.

The numerics (see attention_triton): splits start afresh at absolute positions, a split's partial (m, sums, acc) is
merged in ascending order, row sums are products with ones on the tensor cores. Only keys that some row of the tile does
not see are masked; nothing else differs, and no bit does.
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

KV_TILE = 64
WARPGROUP_ROWS = 64
TILE_ROWS = 2 * WARPGROUP_ROWS
HEAD_DIMS = (64, 128)
DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}
KV_STAGES = 4
# 65536 registers for 12 warps (the producer's warp counts as 4), of which the producer gives most to the others.
REGISTERS, PRODUCER_REGISTERS, CONSUMER_REGISTERS = 168, 24, 240


def supports(q: torch.Tensor, k_cache: torch.Tensor, window: int | None) -> bool:
    """Whether `prefill` has a kernel for these arguments of `attention_triton.attention_forward`."""
    _, num_kv_heads, page_size, head_dim = k_cache.shape
    return (
        window is None
        and page_size == KV_TILE
        and head_dim in HEAD_DIMS
        and q.dtype in DTYPES
        and q.shape[1] // num_kv_heads <= WARPGROUP_ROWS
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
    """Fill out [T, H, D] and, if given, lse [H, T]. Nothing waits for the GPU."""
    num_tokens, num_heads, head_dim = q.shape
    num_pages, num_kv_heads, _, _ = k_cache.shape
    num_requests = kv_lens.shape[0]
    group = triton.next_power_of_2(num_heads // num_kv_heads)
    if q.data_ptr() % 16 or any(stride * q.element_size() % 16 for stride in q.stride()[:2]):
        q = q.contiguous()
    query_box = [WARPGROUP_ROWS // group, group, head_dim]
    query_layout = gl.NVMMASharedLayout(128, 16, rank=3)
    kv_layout = gl.NVMMASharedLayout(128, 16, rank=2)
    queries = TensorDescriptor.from_tensor(q, query_box, query_layout)
    keys, values = (
        TensorDescriptor.from_tensor(cache.view(-1, head_dim), [KV_TILE, head_dim], kv_layout)
        for cache in (k_cache, v_cache)
    )
    num_items = (num_tokens * group // TILE_ROWS + num_requests) * num_kv_heads
    num_programs = min(num_items, torch.cuda.get_device_properties(q.device).multi_processor_count)
    _prefill_kernel[(num_programs,)](
        queries,
        keys,
        values,
        page_table,
        cu_seqlens_q,
        kv_lens,
        num_requests,
        page_table.stride(0),
        num_items,
        scale_log2,
        out,
        out if lse is None else lse,
        num_tokens,
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        GROUP=group,
        BLOCK_REQUESTS=max(32, triton.next_power_of_2(num_requests)),
        SPLIT_TILES=split // KV_TILE,
        STAGES=KV_STAGES,
        WITH_LSE=lse is not None,
        num_warps=4,
        maxnreg=REGISTERS,
    )


@gluon.jit(do_not_specialize=["num_requests", "page_table_stride", "num_items", "num_tokens"])
def _prefill_kernel(
    queries,
    keys,
    values,
    page_table_ptr,
    cu_seqlens_ptr,
    kv_lens_ptr,
    num_requests,
    page_table_stride,
    num_items,
    scale_log2,
    out_ptr,
    lse_ptr,
    num_tokens,
    NUM_HEADS: gl.constexpr,
    NUM_KV_HEADS: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    GROUP: gl.constexpr,
    BLOCK_REQUESTS: gl.constexpr,
    SPLIT_TILES: gl.constexpr,
    STAGES: gl.constexpr,
    WITH_LSE: gl.constexpr,
):
    dtype: gl.constexpr = keys.dtype
    # Two buffers of queries for each warpgroup: those of the next work item arrive while this one is computed.
    q_tiles = gl.allocate_shared_memory(dtype, [4, 64, HEAD_DIM], gl.NVMMASharedLayout(128, 16, rank=2))
    k_tiles = gl.allocate_shared_memory(dtype, [STAGES, 64, HEAD_DIM], keys.layout)
    v_tiles = gl.allocate_shared_memory(dtype, [STAGES, 64, HEAD_DIM], values.layout)
    store_layout: gl.constexpr = gl.BlockedLayout([1, 8], [32, 1], [4, 1], [1, 0])
    ones = gl.allocate_shared_memory(
        dtype, [64, 8], gl.NVMMASharedLayout(0, 16, rank=2), gl.full([64, 8], 1.0, dtype, store_layout)
    )
    barrier_layout: gl.constexpr = mbarrier.MBarrierLayout()
    q_ready = gl.allocate_shared_memory(gl.int64, [4, 1], barrier_layout)
    q_empty = gl.allocate_shared_memory(gl.int64, [4, 1], barrier_layout)
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier_layout)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier_layout)
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier_layout)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier_layout)
    for i in gl.static_range(4):
        mbarrier.init(q_ready.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)
        mbarrier.init(v_ready.index(i), count=1)
        mbarrier.init(v_empty.index(i), count=2)
    fence_async_shared()

    tiles = (q_tiles, k_tiles, v_tiles, ones)
    barriers = (q_ready, q_empty, k_ready, k_empty, v_ready, v_empty)
    places = (cu_seqlens_ptr, kv_lens_ptr, num_requests, num_items)
    outputs = (out_ptr, lse_ptr, num_tokens)
    gl.warp_specialize(
        [
            (
                _consume,
                (
                    0,
                    tiles,
                    barriers,
                    places,
                    outputs,
                    scale_log2,
                    NUM_HEADS,
                    NUM_KV_HEADS,
                    HEAD_DIM,
                    GROUP,
                    BLOCK_REQUESTS,
                    SPLIT_TILES,
                    STAGES,
                    WITH_LSE,
                ),
            ),
            (
                _consume,
                (
                    1,
                    tiles,
                    barriers,
                    places,
                    outputs,
                    scale_log2,
                    NUM_HEADS,
                    NUM_KV_HEADS,
                    HEAD_DIM,
                    GROUP,
                    BLOCK_REQUESTS,
                    SPLIT_TILES,
                    STAGES,
                    WITH_LSE,
                ),
            ),
            (
                _produce,
                (
                    queries,
                    keys,
                    values,
                    tiles,
                    barriers,
                    places,
                    page_table_ptr,
                    page_table_stride,
                    NUM_HEADS,
                    NUM_KV_HEADS,
                    GROUP,
                    BLOCK_REQUESTS,
                    STAGES,
                ),
            ),
        ],
        [4, 1],
        [240, 24],
    )


@gluon.jit
def _locate(item, places, NUM_KV_HEADS: gl.constexpr, GROUP: gl.constexpr, BLOCK_REQUESTS: gl.constexpr):
    """The request and KV head of a work item, its first row, and where its queries lie; num_kv_tiles = 0: no item."""
    cu_seqlens_ptr, kv_lens_ptr, num_requests, num_items = places
    tile = (num_items - 1 - item) // NUM_KV_HEADS
    kv_head = item % NUM_KV_HEADS
    layout: gl.constexpr = gl.BlockedLayout([BLOCK_REQUESTS // 32], [32], [gl.num_warps()], [0])
    requests = gl.arange(0, BLOCK_REQUESTS, layout=layout)
    begins = gl.load(cu_seqlens_ptr + requests, mask=requests < num_requests, other=0)
    first_tiles = begins * GROUP // 128 + requests
    request = gl.sum(((first_tiles <= tile) & (requests < num_requests)).to(gl.int32), 0) - 1
    begin = gl.load(cu_seqlens_ptr + request)
    end = gl.load(cu_seqlens_ptr + request + 1)
    kv_len = gl.load(kv_lens_ptr + request)
    first_token = begin + (tile - begin * GROUP // 128 - request) * (128 // GROUP)
    last_token = gl.minimum(first_token + 128 // GROUP, end) - 1
    num_kv_tiles = gl.where(first_token < end, (kv_len - end + last_token) // 64 + 1, 0)
    return request, kv_head, first_token, end, kv_len, num_kv_tiles


@gluon.jit
def _item(round, num_programs):
    """The round-th item of this program; every other round runs backwards, which evens out falling costs."""
    pid = gl.program_id(0)
    return round * num_programs + gl.where(round % 2 == 0, pid, num_programs - 1 - pid)


@gluon.jit
def _produce(
    queries,
    keys,
    values,
    tiles,
    barriers,
    places,
    page_table_ptr,
    page_table_stride,
    NUM_HEADS: gl.constexpr,
    NUM_KV_HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    BLOCK_REQUESTS: gl.constexpr,
    STAGES: gl.constexpr,
):
    q_tiles, k_tiles, v_tiles, _ = tiles
    q_ready, q_empty, k_ready, k_empty, v_ready, v_empty = barriers
    num_items = places[3]
    num_programs = gl.num_programs(0)
    items_done = 0
    kv = 0
    for round in range(gl.cdiv(num_items, num_programs)):
        item = _item(round, num_programs)
        if item < num_items:
            request, kv_head, first_token, end, kv_len, num_kv_tiles = _locate(
                item, places, NUM_KV_HEADS, GROUP, BLOCK_REQUESTS
            )
            if num_kv_tiles > 0:
                phase = (items_done // 2) & 1
                for w in gl.static_range(2):
                    buffer = 2 * (items_done % 2) + w
                    mbarrier.wait(q_empty.index(buffer), phase ^ 1)
                    mbarrier.expect(q_ready.index(buffer), queries.block_type.nbytes)
                    box = q_tiles.index(buffer)._reinterpret(queries.dtype, queries.block_type.shape, queries.layout)
                    tma.async_copy_global_to_shared(
                        queries,
                        [first_token + w * (64 // GROUP), kv_head * (NUM_HEADS // NUM_KV_HEADS), 0],
                        q_ready.index(buffer),
                        box,
                    )
                items_done += 1
                pages_ptr = page_table_ptr + request.to(gl.int64) * page_table_stride
                page = gl.load(pages_ptr)
                for j in range(num_kv_tiles):
                    next_page = gl.load(pages_ptr + gl.minimum(j + 1, num_kv_tiles - 1))
                    row = (page * NUM_KV_HEADS + kv_head) * 64
                    slot = kv % STAGES
                    phase = (kv // STAGES) & 1
                    mbarrier.wait(k_empty.index(slot), phase ^ 1)
                    mbarrier.expect(k_ready.index(slot), keys.block_type.nbytes)
                    tma.async_copy_global_to_shared(keys, [row, 0], k_ready.index(slot), k_tiles.index(slot))
                    mbarrier.wait(v_empty.index(slot), phase ^ 1)
                    mbarrier.expect(v_ready.index(slot), values.block_type.nbytes)
                    tma.async_copy_global_to_shared(values, [row, 0], v_ready.index(slot), v_tiles.index(slot))
                    kv += 1
                    page = next_page


@gluon.jit
def _softmax(scores, m, key, position, scale_log2, dtype: gl.constexpr, MASKED: gl.constexpr):
    """The weights of a tile of scores, the new maximum, and the factor by which what came before shrinks."""
    if MASKED:
        scores = gl.where(key[None, :] <= position[:, None], scores, float("-inf"))
    new_m = gl.maximum(m, gl.max(scores, 1))
    finite_m = gl.where(new_m == float("-inf"), 0.0, new_m)
    p = gl.exp2(gl.fma(scores, scale_log2, -(finite_m * scale_log2)[:, None])).to(dtype)
    return p, new_m, gl.exp2((m - finite_m) * scale_log2)


@gluon.jit
def _merge(total_m, total_sums, total_acc, m, sums, acc, scale_log2):
    """`attention_triton._merge`."""
    new_m = gl.maximum(total_m, m)
    finite_m = gl.where(new_m == float("-inf"), 0.0, new_m)
    old = gl.exp2((total_m - finite_m) * scale_log2)
    new = gl.exp2((m - finite_m) * scale_log2)
    sum_rows: gl.constexpr = gl.SliceLayout(1, sums.type.layout)
    acc_rows: gl.constexpr = gl.SliceLayout(1, acc.type.layout)
    old_s, new_s = gl.convert_layout(old, sum_rows)[:, None], gl.convert_layout(new, sum_rows)[:, None]
    old_a, new_a = gl.convert_layout(old, acc_rows)[:, None], gl.convert_layout(new, acc_rows)[:, None]
    return new_m, gl.fma(total_sums, old_s, sums * new_s), gl.fma(total_acc, old_a, acc * new_a)


@gluon.jit
def _steps(
    first,
    last,
    state,
    q,
    position,
    kv,
    tiles,
    barriers,
    scale_log2,
    SPLIT_TILES: gl.constexpr,
    STAGES: gl.constexpr,
    MASKED: gl.constexpr,
):
    """Tiles [first, last): scores and softmax of each, and the product with the values of the tile before it."""
    _, k_tiles, v_tiles, ones = tiles
    _, _, k_ready, k_empty, v_ready, v_empty = barriers
    p, m, sums, acc, total_m, total_sums, total_acc = state
    dtype: gl.constexpr = p.dtype
    rows: gl.constexpr = m.type.layout
    score_layout: gl.constexpr = rows.parent
    sum_rows: gl.constexpr = gl.SliceLayout(1, sums.type.layout)
    acc_rows: gl.constexpr = gl.SliceLayout(1, acc.type.layout)
    key_in_tile = gl.arange(0, 64, layout=gl.SliceLayout(0, score_layout))
    for j in range(first, last):
        slot = (kv + j) % STAGES
        v_slot = (kv + j - 1) % STAGES
        mbarrier.wait(k_ready.index(slot), ((kv + j) // STAGES) & 1)
        scores = warpgroup_mma(
            q,
            k_tiles.index(slot).permute((1, 0)),
            gl.zeros([64, 64], gl.float32, score_layout),
            use_acc=False,
            is_async=True,
        )
        acc = warpgroup_mma(p, v_tiles.index(v_slot), acc, is_async=True)
        sums = warpgroup_mma(p, ones, sums, is_async=True)
        scores = warpgroup_mma_wait(2, [scores])
        mbarrier.arrive(k_empty.index(slot))
        starts_split = j % SPLIT_TILES == 0
        next_p, new_m, shrink = _softmax(
            scores,
            gl.where(starts_split, float("-inf"), m),
            j * 64 + key_in_tile,
            position,
            scale_log2,
            dtype,
            MASKED,
        )
        mbarrier.wait(v_ready.index(slot), ((kv + j) // STAGES) & 1)
        acc, sums, p = warpgroup_mma_wait(0, [acc, sums, p])
        mbarrier.arrive(v_empty.index(v_slot))
        if starts_split:
            total_m, total_sums, total_acc = _merge(total_m, total_sums, total_acc, m, sums, acc, scale_log2)
            sums = gl.zeros_like(sums)
            acc = gl.zeros_like(acc)
        else:
            sums = sums * gl.convert_layout(shrink, sum_rows)[:, None]
            acc = acc * gl.convert_layout(shrink, acc_rows)[:, None]
        m = new_m
        p = gl.convert_layout(next_p, p.type.layout)
    return p, m, sums, acc, total_m, total_sums, total_acc


@gluon.jit
def _consume(
    w: gl.constexpr,
    tiles,
    barriers,
    places,
    outputs,
    scale_log2,
    NUM_HEADS: gl.constexpr,
    NUM_KV_HEADS: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    GROUP: gl.constexpr,
    BLOCK_REQUESTS: gl.constexpr,
    SPLIT_TILES: gl.constexpr,
    STAGES: gl.constexpr,
    WITH_LSE: gl.constexpr,
):
    q_tiles, k_tiles, v_tiles, ones = tiles
    q_ready, q_empty, k_ready, k_empty, v_ready, v_empty = barriers
    out_ptr, lse_ptr, num_tokens = outputs
    num_items = places[3]
    dtype: gl.constexpr = q_tiles.dtype
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    sum_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 8, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, acc_layout, 2)
    store_layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HEAD_DIM, HEAD_DIM // 8], [4, 1], [1, 0])
    rows: gl.constexpr = gl.SliceLayout(1, score_layout)
    sum_rows: gl.constexpr = gl.SliceLayout(1, sum_layout)
    acc_rows: gl.constexpr = gl.SliceLayout(1, acc_layout)
    store_rows: gl.constexpr = gl.SliceLayout(1, store_layout)

    num_programs = gl.num_programs(0)
    items_done = 0
    kv = 0
    for round in range(gl.cdiv(num_items, num_programs)):
        item = _item(round, num_programs)
        if item < num_items:
            request, kv_head, first_token, end, kv_len, num_kv_tiles = _locate(
                item, places, NUM_KV_HEADS, GROUP, BLOCK_REQUESTS
            )
            if num_kv_tiles > 0:
                first_token += w * (64 // GROUP)
                first_position = kv_len - end + first_token
                position = first_position + gl.arange(0, 64, layout=rows) // GROUP
                buffer = 2 * (items_done % 2) + w
                q = q_tiles.index(buffer)

                slot = kv % STAGES
                mbarrier.wait(q_ready.index(buffer), (items_done // 2) & 1)
                mbarrier.wait(k_ready.index(slot), (kv // STAGES) & 1)
                scores = warpgroup_mma(
                    q,
                    k_tiles.index(slot).permute((1, 0)),
                    gl.zeros([64, 64], gl.float32, score_layout),
                    use_acc=False,
                )
                mbarrier.arrive(k_empty.index(slot))
                m = gl.full([64], float("-inf"), gl.float32, rows)
                total_sums = gl.zeros([64, 8], gl.float32, sum_layout)
                total_acc = gl.zeros([64, HEAD_DIM], gl.float32, acc_layout)
                key = gl.arange(0, 64, layout=gl.SliceLayout(0, score_layout))
                p, new_m, _ = _softmax(scores, m, key, position, scale_log2, dtype, True)
                p = gl.convert_layout(p, p_layout)
                mbarrier.wait(v_ready.index(slot), (kv // STAGES) & 1)
                state = (p, new_m, total_sums, total_acc, m, total_sums, total_acc)
                first_masked = gl.maximum(gl.minimum((first_position + 1) // 64, num_kv_tiles), 1)
                state = _steps(
                    1, first_masked, state, q, position, kv, tiles, barriers, scale_log2, SPLIT_TILES, STAGES, False
                )
                state = _steps(
                    first_masked,
                    num_kv_tiles,
                    state,
                    q,
                    position,
                    kv,
                    tiles,
                    barriers,
                    scale_log2,
                    SPLIT_TILES,
                    STAGES,
                    True,
                )
                p, m, sums, acc, total_m, total_sums, total_acc = state

                mbarrier.arrive(q_empty.index(buffer))
                items_done += 1
                kv += num_kv_tiles
                slot = (kv - 1) % STAGES
                v = v_tiles.index(slot)
                if num_kv_tiles * 64 > kv_len:
                    # Behind the request's last key lies anything, and 0 * NaN is not 0.
                    value_key = (num_kv_tiles - 1) * 64 + gl.arange(0, 64, layout=store_rows)
                    v.store(gl.where((value_key < kv_len)[:, None], v.load(store_layout), 0.0))
                    fence_async_shared()
                    gl.thread_barrier()
                acc = warpgroup_mma(p, v, acc, is_async=True)
                sums = warpgroup_mma(p, ones, sums, is_async=True)
                acc, sums, p = warpgroup_mma_wait(0, [acc, sums, p])
                mbarrier.arrive(v_empty.index(slot))
                m, sums, acc = _merge(total_m, total_sums, total_acc, m, sums, acc, scale_log2)

                sums = gl.max(sums, 1)
                out = (acc / gl.convert_layout(sums, acc_rows)[:, None]).to(dtype)
                row = gl.arange(0, 64, layout=store_rows)
                token = first_token + row // GROUP
                exists = (token < end) & (row % GROUP < NUM_HEADS // NUM_KV_HEADS)
                head = kv_head * (NUM_HEADS // NUM_KV_HEADS) + row % GROUP
                offsets = (token.to(gl.int64) * NUM_HEADS + head) * HEAD_DIM
                d = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, store_layout))
                gl.store(
                    out_ptr + offsets[:, None] + d[None, :],
                    gl.convert_layout(out, store_layout),
                    mask=exists[:, None],
                )
                if WITH_LSE:
                    row = gl.arange(0, 64, layout=rows)
                    token = first_token + row // GROUP
                    exists = (token < end) & (row % GROUP < NUM_HEADS // NUM_KV_HEADS)
                    head = kv_head * (NUM_HEADS // NUM_KV_HEADS) + row % GROUP
                    lse = (m * scale_log2 + gl.log2(gl.convert_layout(sums, rows))) * 0.6931471805599453
                    gl.store(lse_ptr + head.to(gl.int64) * num_tokens + token, lse, mask=exists)
