"""Paged attention on the CPU in fp32: a numba kernel whose unit is one query row.

How a row is computed, whatever surrounds it: KV is cut into splits at absolute positions 0, SPLIT, 2 * SPLIT, ... In
a split, a score is one chain of fused multiply-adds over the head dimension, the row sum has 16 partial sums chosen by
absolute position and added as a tree, and the output is one chain of fused multiply-adds over the positions. Splits are
merged in ascending order. The loops below only decide when each of these operations happens: rows of consecutive
tokens, or of decoding requests whose page tables begin with the same pages, go over a page together.
"""

import numpy as np
import torch

from lockstep.kernels._cpu import exp32, fma32, inline_njit, log32, njit, parallel_rows
from lockstep.kernels._cpu_vectors import (
    add_products,
    at,
    copy,
    fill,
    fma_rows,
    pointer,
    prefetch,
    vector_max,
    vector_sum,
)
from lockstep.kernels.memory.kv_cache import CPU_VECTOR, cpu_arrays
from lockstep.kernels.memory.latent_cache import cpu_array

SPLIT = 256
# Query rows (tokens times heads of a KV group) that share a pass over the keys and values of a split.
TILE_ROWS = 32
# Vectors of keys whose scores are computed side by side.
KEY_VECTORS = 4
# Query-key pairs per thread under which handing work to a second thread costs more than it saves.
MIN_PAIRS_PER_THREAD = 100_000
# A page may begin up to 63 positions before the split that it reaches into, and end as far behind it.
MARGIN = 64
SCORE_STRIDE = SPLIT + 2 * MARGIN

_ZERO, _NEGATIVE_INFINITY = np.float32(0.0), np.float32(-np.inf)
_NO_LSE = np.empty((0, 0), np.float32)
# e^x is taken as 0 below; keeps denormal numbers, which are slow, out of the sums.
_EXP_LOWEST = np.float32(-87.0)


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
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`lockstep.kernels.attention.attention` for CPU tensors; also the log-sum-exp [H, T] if asked for."""
    if q.dtype != torch.float32:
        raise ValueError(f"attention on the CPU is fp32 only, got {q.dtype}")
    num_tokens, num_heads, _ = q.shape
    num_kv_heads = k_cache.shape[1]
    shape = (num_tokens, num_heads, num_kv_heads, k_cache.shape[2], q.shape[2], q.shape[2], False)
    return _forward(
        q, *cpu_arrays(k_cache, v_cache), page_table, cu_seqlens_q, kv_lens, shape, scale, window or 1 << 40, with_lse
    )


def latent_attention_forward(
    q: torch.Tensor,
    cache: torch.Tensor,
    value_dim: int,
    page_table: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    kv_lens: torch.Tensor,
    scale: float,
    with_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`latent_attention.latent_attention` for CPU tensors; also the log-sum-exp [H, T] if asked for."""
    if q.dtype != torch.float32:
        raise ValueError(f"latent_attention on the CPU is fp32 only, got {q.dtype}")
    num_tokens, num_heads, head_dim = q.shape
    rows = cpu_array(cache)
    shape = (num_tokens, num_heads, 1, cache.shape[2], head_dim, value_dim, True)
    return _forward(q, rows, rows, page_table, cu_seqlens_q, kv_lens, shape, scale, 1 << 40, with_lse)


def _forward(
    q: torch.Tensor,
    k_memory: np.ndarray,
    v_memory: np.ndarray,
    page_table: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    kv_lens: torch.Tensor,
    shape: tuple[int, int, int, int, int, int, bool],
    scale: float,
    window: int,
    with_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """shape: tokens, heads, KV heads, page size, head_dim, value_dim, and whether values are the first columns of the
    keys, which then lie as the values do, a token in a row.
    """
    num_tokens, num_heads, num_kv_heads, _, _, value_dim, _ = shape
    q = q.detach().contiguous()
    out = torch.empty((num_tokens, num_heads, value_dim), dtype=torch.float32, device="cpu")
    lse = torch.empty((num_heads, num_tokens), dtype=torch.float32, device="cpu") if with_lse else None
    lengths = kv_lens.contiguous().numpy()
    if num_tokens == 0 or lengths.size == 0:
        return out, lse
    pairs_per_row = max(1, int(lengths.max()) * num_heads // num_kv_heads)
    parallel_rows(
        _attend,
        num_kv_heads * num_tokens,
        -(-MIN_PAIRS_PER_THREAD // pairs_per_row),
        q.numpy(),
        k_memory,
        v_memory,
        page_table.contiguous().numpy(),
        cu_seqlens_q.contiguous().numpy(),
        lengths,
        out.numpy(),
        _NO_LSE if lse is None else lse.numpy(),
        shape,
        np.float32(scale),
        window,
    )
    return out, lse


_set_scores = fma_rows(KEY_VECTORS, accumulate=False)


@inline_njit
def _softmax(scores, size, low, high, scale):
    """Turn scores into exp(scale * score - m), 0 outside [low, high); returns (m, their sum).

    The number of scores is a multiple of 16. A column's lane is its absolute position modulo 16, as splits and `scores`
    begin at multiples of 16.
    """
    fill(scores, 0, low, _NEGATIVE_INFINITY)
    fill(scores, high, size, _NEGATIVE_INFINITY)
    m = scale * vector_max(scores, size // CPU_VECTOR)
    for i in range(size):
        x = fma32(scores[i], scale, -m)
        p = exp32(_EXP_LOWEST if x < _EXP_LOWEST else x)
        scores[i] = _ZERO if x < _EXP_LOWEST else p
    return m, vector_sum(scores, size // CPU_VECTOR)


@inline_njit
def _merge(part, part_max, part_sum, total, total_max, total_sum, size):
    """Fold a split's (output, max, sum) into the row's; `total` changes in place, the new max and sum are returned."""
    if total_sum == _ZERO:
        copy(part, total, size)
        return part_max, part_sum
    m = part_max if part_max > total_max else total_max
    old, new = exp32(total_max - m), exp32(part_max - m)
    for i in range(size):
        total[i] = fma32(part[i], new, total[i] * old)
    return m, fma32(part_sum, new, total_sum * old)


@inline_njit
def _prefetch_floats(pointer, size):
    for i in range(0, size, CPU_VECTOR):
        prefetch(pointer, i)


@inline_njit
def _visible(position, split, split_end, window):
    """The positions [low, high) of a split that the query at `position` sees."""
    return max(split, position - window + 1), min(split_end, position + 1)


@inline_njit
def _transpose(rows, columns, num_rows, num_columns):
    for i in range(num_rows):
        row = at(rows, i * num_columns)
        for j in range(num_columns):
            columns[j * num_rows + i] = row[j]


@inline_njit
def _list_keys(pages, page_begin, page_end, split, kv_head, shape, key_offsets, columns, k_memory, v_memory):
    """Where in k_memory the vectors of keys of some pages lie, and the columns of their scores; returns how many.

    Their number is made a multiple of KEY_VECTORS by repeating the last. Asks for the values of the pages, which are
    needed once the scores are there. Keys that share their memory with the values are laid out in k_memory first.
    """
    _, num_kv_heads, page_size, head_dim, _, _, is_latent = shape
    count = 0
    for page in range(page_begin, page_end):
        key = (np.int64(pages[page]) * num_kv_heads + kv_head) * page_size * head_dim
        if is_latent:
            value, key = key, (page - page_begin) * page_size * head_dim
            _transpose(at(v_memory, value), at(k_memory, key), page_size, head_dim)
        else:
            _prefetch_floats(at(v_memory, key), page_size * head_dim)
        for i in range(0, page_size, CPU_VECTOR):
            key_offsets[count], columns[count] = key + i, page * page_size + i - split + MARGIN
            count += 1
    while count % KEY_VECTORS:
        key_offsets[count], columns[count] = key_offsets[count - 1], columns[count - 1]
        count += 1
    return count


@inline_njit
def _attend_tile(tile, caches, shape, scale, window, scratch):
    """The rows of some tokens and one KV group, in one pass over the `shared_pages` that their page tables begin with.

    These are consecutive tokens of one request, which share all pages, or tokens of different requests, all of which
    see the shared pages whole. Leaves the not yet normalised outputs, the maxima and the sums in `scratch`.
    """
    kv_head, tokens, shared_pages = tile
    k_memory, v_memory, page_table, max_pages = caches
    group, num_kv_heads, page_size, head_dim, value_dim, row_stride, _ = shape
    requests, positions, key_offsets, columns, value_offsets = scratch[0]
    queries, scores, part, part_max, part_sum, total, total_max, total_sum = scratch[1]
    fill(total_sum, 0, tokens * group, _ZERO)
    lowest, visible_end = max(0, positions[0] - window + 1), 0
    for t in range(tokens):
        visible_end = max(visible_end, positions[t] + 1)
    for split in range(lowest // SPLIT * SPLIT, visible_end, SPLIT):
        split_end = min(split + SPLIT, visible_end)
        first_page, end_page = max(split, lowest) // page_size, (split_end - 1) // page_size + 1
        # Once for the pages that the tokens share, then for each token's own.
        for own in range(tokens + 1):
            if own == 0:
                first, end, page_begin, page_end = 0, tokens, first_page, min(end_page, shared_pages)
            else:
                first, end, page_begin = own - 1, own, max(first_page, shared_pages)
                page_end = min(end_page, positions[first] // page_size + 1)
            if page_begin >= page_end:
                continue
            count = _list_keys(
                at(page_table, requests[first] * max_pages),
                page_begin,
                page_end,
                split,
                kv_head,
                shape,
                key_offsets,
                columns,
                k_memory,
                v_memory,
            )
            # A whole vector is written even if the page ends within it; what is beyond is overwritten or masked.
            for i in range(0, count, KEY_VECTORS):
                row = max(first, columns[i] - MARGIN + split - positions[first]) * group
                _set_scores(
                    end * group - row,
                    (at(scores, row * SCORE_STRIDE), SCORE_STRIDE, columns),
                    (at(queries, row * head_dim), head_dim),
                    (k_memory, page_size, key_offsets),
                    *(i, head_dim),
                )
        for t in range(tokens):
            low, high = _visible(positions[t], split, split_end, window)
            if low >= high:
                continue
            begin, end = (low - split) // CPU_VECTOR * CPU_VECTOR, -(-(high - split) // CPU_VECTOR) * CPU_VECTOR
            for r in range(t * group, (t + 1) * group):
                row = at(scores, r * SCORE_STRIDE + MARGIN + begin)
                m, s = _softmax(row, end - begin, low - split - begin, high - split - begin, scale)
                part_max[r], part_sum[r] = m, s
        fill(part, 0, tokens * group * row_stride, _ZERO)
        for page in range(first_page, end_page):
            page_low, page_high = page * page_size, (page + 1) * page_size
            first_low, first_high = _visible(positions[0], split, split_end, window)
            last_low, last_high = _visible(positions[tokens - 1], split, split_end, window)
            together = (
                page < shared_pages
                and max(first_low, page_low) == max(last_low, page_low)
                and min(first_high, page_high) == min(last_high, page_high)
            )
            step = tokens if together else 1
            for t in range(0, tokens, step):
                low, high = _visible(positions[t], split, split_end, window)
                low, high = max(low, page_low), min(high, page_high)
                if low >= high:
                    continue
                value = (
                    (np.int64(page_table[requests[t] * max_pages + page]) * num_kv_heads + kv_head)
                    * page_size
                    * head_dim
                )
                add_products(
                    step * group,
                    (at(part, t * group * row_stride), row_stride, value_offsets),
                    (at(scores, t * group * SCORE_STRIDE + low - split + MARGIN), SCORE_STRIDE),
                    (at(v_memory, value + (low - page_low) * head_dim), head_dim, value_offsets),
                    *(row_stride // CPU_VECTOR, high - low),
                )
        for t in range(tokens):
            low, high = _visible(positions[t], split, split_end, window)
            if low >= high:
                continue
            for r in range(t * group, (t + 1) * group):
                total_max[r], total_sum[r] = _merge(
                    *(at(part, r * row_stride), part_max[r], part_sum[r]),
                    *(at(total, r * row_stride), total_max[r], total_sum[r], value_dim),
                )


@inline_njit
def _shared_pages(pages, other_pages, most):
    """The number of leading pages that two requests share, at most `most`."""
    count = 0
    while count < most and pages[count] == other_pages[count]:
        count += 1
    return count


@inline_njit
def _gather_decodes(request, most_tokens, page_table, max_pages, cu_seqlens, kv_lens, page_size, window):
    """How many requests from `request` on, all of one query, to take as one tile, and the pages that they share.

    As many as share with the first what the second shares with it. All of them see those pages whole.
    """
    tokens, shared = 1, min(kv_lens[request] // page_size, max_pages)
    pages = at(page_table, request * max_pages)
    for other in range(request + 1, request + most_tokens):
        if cu_seqlens[other + 1] - cu_seqlens[other] != 1 or max(kv_lens[request], kv_lens[other]) > window:
            break
        whole = min(shared, kv_lens[other] // page_size)
        common = _shared_pages(pages, at(page_table, other * max_pages), whole)
        if common == 0 or (tokens > 1 and common < shared):
            break
        tokens, shared = tokens + 1, common
    return tokens, shared


@inline_njit
def _tile_shape(sizes):
    """(tokens, rows) of a full tile, and the floats between the outputs of two rows."""
    _, num_heads, num_kv_heads, _, _, value_dim, _ = sizes
    group = num_heads // num_kv_heads
    tokens = max(1, TILE_ROWS // group)
    return tokens, tokens * group, (value_dim + CPU_VECTOR - 1) // CPU_VECTOR * CPU_VECTOR


@inline_njit
def _attend_rows(start, stop, arrays, max_pages, num_requests, with_lse, sizes, scale, window, floats, integers):
    q, k_memory, v_memory, page_table, cu_seqlens, kv_lens, out, lse = arrays
    num_tokens, num_heads, num_kv_heads, page_size, head_dim, value_dim, is_latent = sizes
    group = num_heads // num_kv_heads
    tile_tokens, tile_rows, row_stride = _tile_shape(sizes)
    requests = pointer(integers)
    positions = at(requests, tile_tokens)
    key_offsets = at(positions, tile_tokens)
    columns = at(key_offsets, SCORE_STRIDE)
    value_offsets = at(columns, SCORE_STRIDE)
    for i in range(row_stride // CPU_VECTOR):
        value_offsets[i] = i * CPU_VECTOR
    scores = pointer(floats)
    part = at(scores, tile_rows * SCORE_STRIDE)
    total = at(part, tile_rows * row_stride)
    queries = at(total, tile_rows * row_stride)
    part_max = at(queries, tile_rows * head_dim)
    part_sum = at(part_max, tile_rows)
    total_max = at(part_sum, tile_rows)
    total_sum = at(total_max, tile_rows)
    if is_latent:
        k_memory = at(total_sum, tile_rows)
    scratch = (
        (requests, positions, key_offsets, columns, value_offsets),
        (queries, scores, part, part_max, part_sum, total, total_max, total_sum),
    )
    shape = (group, num_kv_heads, page_size, head_dim, value_dim, row_stride, is_latent)
    # A thread that has all KV heads takes them tile by tile: their keys lie side by side.
    whole = stop - start == num_kv_heads * num_tokens
    stop = num_tokens if whole else stop
    row, request = start, 0
    while row < stop:
        first_head, token = row // num_tokens, row % num_tokens
        if token < cu_seqlens[request]:
            request = 0
        while request < num_requests and cu_seqlens[request + 1] <= token:
            request += 1
        if request == num_requests:
            row, request = (first_head + 1) * num_tokens, 0
            continue
        if cu_seqlens[request + 1] - cu_seqlens[request] == 1:
            most = min(tile_tokens, stop - row, num_requests - request)
            tokens, shared_pages = _gather_decodes(
                request, most, page_table, max_pages, cu_seqlens, kv_lens, page_size, window
            )
            last_request = request + tokens - 1
        else:
            tokens, shared_pages = min(tile_tokens, stop - row, cu_seqlens[request + 1] - token), max_pages
            last_request = request
        for t in range(tokens):
            owner = min(request + t, last_request)
            requests[t], positions[t] = owner, kv_lens[owner] - cu_seqlens[owner + 1] + token + t
            if positions[t] < token + t - cu_seqlens[owner] or kv_lens[owner] > max_pages * page_size:
                raise ValueError("attention: kv_lens does not fit the queries or the page table")
        for kv_head in range(first_head, num_kv_heads if whole else first_head + 1):
            for t in range(tokens):
                source = ((token + t) * num_heads + kv_head * group) * head_dim
                copy(at(q, source), at(queries, t * group * head_dim), group * head_dim)
            tile = (kv_head, tokens, shared_pages)
            _attend_tile(tile, (k_memory, v_memory, page_table, max_pages), shape, scale, window, scratch)
            for t in range(token, token + tokens):
                for head in range(kv_head * group, (kv_head + 1) * group):
                    r = (t - token) * group + head - kv_head * group
                    row_total, row_out = at(total, r * row_stride), at(out, (t * num_heads + head) * value_dim)
                    for i in range(value_dim):
                        row_out[i] = row_total[i] / total_sum[r]
                    if with_lse:
                        lse[head * num_tokens + t] = total_max[r] + log32(total_sum[r])
        row += tokens


@njit
def _attend(start, stop, q, k_memory, v_memory, page_table, cu_seqlens, kv_lens, out, lse, sizes, scale, window):
    """Rows [start, stop) of the [num_kv_heads, T] query rows; a row is a token's heads of one KV group."""
    tile_tokens, tile_rows, row_stride = _tile_shape(sizes)
    head_dim, is_latent = sizes[4], sizes[6]
    num_floats = tile_rows * (SCORE_STRIDE + 2 * row_stride + head_dim + 4)
    floats = np.empty(num_floats + (SCORE_STRIDE * head_dim + CPU_VECTOR if is_latent else 0), np.float32)
    integers = np.empty(2 * tile_tokens + 2 * SCORE_STRIDE + row_stride // CPU_VECTOR, np.int64)
    arrays = (
        *(pointer(q), pointer(k_memory), pointer(v_memory), pointer(page_table), pointer(cu_seqlens)),
        *(pointer(kv_lens), pointer(out), pointer(lse)),
    )
    _attend_rows(
        *(start, stop, arrays, page_table.shape[1], kv_lens.size, lse.size > 0, sizes, scale, window),
        *(floats, integers),
    )
