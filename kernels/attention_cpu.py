"""Paged attention on the CPU in fp32: a numba forward whose unit is one query row, and a blocked torch backward.

How a row is computed, whatever surrounds it: KV is cut into splits at absolute positions 0, SPLIT, 2 * SPLIT, ... In
a split, a score is one chain of fused multiply-adds over the head dimension, the row sum has 16 partial sums chosen by
absolute position and added as a tree, and the output is one chain of fused multiply-adds over the positions. Splits are
merged in ascending order. The loops below only decide when each of these operations happens.
"""

from collections.abc import Iterator

import numpy as np
import torch
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from lockstep.kernels._cpu import exp32, fma32, inline_njit, log32, njit, parallel_rows
from lockstep.kernels.kv_cache import CPU_VECTOR, cpu_arrays

SPLIT = 256
# Query rows (tokens times heads of a KV group) that share a pass over the keys and values of a split.
TILE_ROWS = 32
# Query-key pairs per thread under which handing work to a second thread costs more than it saves.
MIN_PAIRS_PER_THREAD = 100_000
# Backward: queries of a block, scores in a batch of blocks (they should stay in the cache), padding of lengths.
QUERY_BLOCK = 64
BLOCK_SCORES = 1 << 19
LENGTH_STEP = 16

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
    q = q.detach().contiguous()
    out = torch.empty_like(q)
    lse = torch.empty((num_heads, num_tokens), dtype=torch.float32) if with_lse else None
    lengths = kv_lens.contiguous().numpy()
    if num_tokens == 0 or lengths.size == 0:
        return out, lse
    pairs_per_row = max(1, int(lengths.max()) * num_heads // num_kv_heads)
    parallel_rows(
        _attend,
        num_kv_heads * num_tokens,
        -(-MIN_PAIRS_PER_THREAD // pairs_per_row),
        q.numpy(),
        *cpu_arrays(k_cache, v_cache),
        page_table.contiguous().numpy(),
        cu_seqlens_q.contiguous().numpy(),
        lengths,
        out.numpy(),
        _NO_LSE if lse is None else lse.numpy(),
        (num_tokens, num_heads, num_kv_heads, k_cache.shape[2], q.shape[2]),
        np.float32(scale),
        window or 1 << 40,
    )
    return out, lse


def attention_backward(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    cu_seqlens: torch.Tensor,
    scale: float,
    window: int | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients (dq, dk, dv) of `attention_packed` on the CPU; plain torch, deterministic.

    Sequences of about the same length are padded to a batch; a long one goes block by block over its queries.
    """
    num_kv_heads, group = k.shape[1], q.shape[1] // k.shape[1]
    inputs = (grad_out, q, k, v, lse.T, (grad_out * out).sum(-1))
    grads = tuple(torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v))
    for rows, real in _padded_batches(cu_seqlens, q.shape[1]):
        num_sequences, length = rows.shape
        batch = []
        for x in inputs:
            padded = x[rows].masked_fill_(~real.view(num_sequences, length, *[1] * (x.ndim - 1)), 0.0)
            by_head = padded.view(num_sequences, length, num_kv_heads, -1, *x.shape[2:]).transpose(1, 2)
            batch.append(by_head.reshape(num_sequences * num_kv_heads, -1, *x.shape[2:]))
        padded_grads = _backward_batch(*batch, group, scale, window or length)
        for grad, padded in zip(grads, padded_grads, strict=True):
            by_token = padded.view(num_sequences, num_kv_heads, length, -1, grad.shape[2]).transpose(1, 2)
            grad[rows[real]] = by_token.reshape(num_sequences, length, *grad.shape[1:])[real]
    return grads


def _padded_batches(cu_seqlens: torch.Tensor, num_heads: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of similar sequences: their rows [N, L] in the packed batch, and which of them are not padding."""
    starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
    padded_lengths = (lengths + LENGTH_STEP - 1) // LENGTH_STEP * LENGTH_STEP
    for length in padded_lengths[lengths > 0].unique().tolist():
        sequences = (padded_lengths == length).nonzero().view(-1)
        position = torch.arange(length)
        for some in sequences.split(max(1, BLOCK_SCORES // (num_heads * min(length, QUERY_BLOCK) * length))):
            real = position < lengths[some, None]
            yield torch.where(real, starts[some, None] + position, 0), real


def _backward_batch(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lse: torch.Tensor,
    delta: torch.Tensor,
    group: int,
    scale: float,
    window: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients for M pairs of (sequence, KV head): k, v [M, L, D]; grad_out, q [M, L * G, D]; lse, delta [M, L * G].

    P = exp(scale * q k^T - lse); dv = P^T dO; dS = P * (dO v^T - delta); dq = scale * dS k; dk = scale * dS^T q.
    """
    length = k.shape[1]
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for begin in range(0, length, QUERY_BLOCK):
        end = min(begin + QUERY_BLOCK, length)
        first_key = max(0, begin - window + 1)
        rows, keys = slice(begin * group, end * group), slice(first_key, end)
        position = torch.arange(begin, end).repeat_interleave(group)
        distance = position[:, None] - torch.arange(first_key, end)
        hidden = (distance < 0) | (distance >= window)
        weights = torch.baddbmm(lse[:, rows, None], q[:, rows], k[:, keys].mT, beta=-1, alpha=scale)
        weights.exp_().masked_fill_(hidden, 0.0)
        dv[:, keys].baddbmm_(weights.mT, grad_out[:, rows])
        grad_scores = torch.baddbmm(delta[:, rows, None], grad_out[:, rows], v[:, keys].mT, beta=-1).mul_(weights)
        dq[:, rows] = torch.bmm(grad_scores, k[:, keys]).mul_(scale)
        dk[:, keys].baddbmm_(grad_scores.mT, q[:, rows], alpha=scale)
    return dq, dk, dv


_VECTOR = ir.VectorType(ir.FloatType(), CPU_VECTOR)


def _pointer(context, builder, array_type, array, index):
    """The address of the float `index` places behind the array's first, whatever its strides."""
    return builder.gep(context.make_array(array_type)(context, builder, value=array).data, [index])


def _fma_chain(num_rows, accumulate):
    """acc[a + r * acc_stride :][:16] = (acc or 0) + sum over i < n, in ascending order, of
    coefficients[c + r * coefficient_stride + i] * memory[m + i * memory_stride :][:16], for r < num_rows.

    The sums stay in registers, and each vector of `memory` is loaded once for all rows.
    """

    @intrinsic
    def chain(typingctx, acc, a, acc_stride, coefficients, c, coefficient_stride, memory, m, memory_stride, n):
        index = types.intp
        signature = types.void(acc, index, index, coefficients, index, index, memory, index, index, index)

        def codegen(context, builder, signature, args):
            acc, a, acc_stride, coefficients, c, coefficient_stride, memory, m, memory_stride, n = args
            acc_type, coefficients_type, memory_type = (signature.args[i] for i in (0, 3, 6))
            word, lane = n.type, ir.IntType(32)
            fma_type = ir.FunctionType(_VECTOR, [_VECTOR] * 3)
            fma = cgutils.get_or_insert_function(builder.module, fma_type, f"llvm.fma.v{CPU_VECTOR}f32")
            undefined = ir.Constant(_VECTOR, ir.Undefined)
            first_lane = ir.Constant(ir.VectorType(lane, CPU_VECTOR), [0] * CPU_VECTOR)

            def at(array_type, array, base, step, stride):
                return _pointer(context, builder, array_type, array, builder.add(base, builder.mul(step, stride)))

            rows = [word(r) for r in range(num_rows)]
            targets = [builder.bitcast(at(acc_type, acc, a, r, acc_stride), _VECTOR.as_pointer()) for r in rows]
            zero = ir.Constant(_VECTOR, [0.0] * CPU_VECTOR)
            starts = [builder.load(target, align=4) if accumulate else zero for target in targets]
            sums = [cgutils.alloca_once_value(builder, start) for start in starts]
            with cgutils.for_range(builder, n) as loop:
                source = at(memory_type, memory, m, loop.index, memory_stride)
                values = builder.load(builder.bitcast(source, _VECTOR.as_pointer()), align=4)
                for r, total in zip(rows, sums, strict=True):
                    source = at(coefficients_type, coefficients, builder.add(c, loop.index), r, coefficient_stride)
                    splat = builder.insert_element(undefined, builder.load(source), lane(0))
                    splat = builder.shuffle_vector(splat, undefined, first_lane)
                    builder.store(builder.call(fma, [splat, values, builder.load(total)]), total)
            for target, total in zip(targets, sums, strict=True):
                builder.store(builder.load(total), target, align=4)
            return context.get_dummy_value()

        return signature, codegen

    return chain


def _reduction(start, combine):
    """array[b : b + 16 * n] to one float: lane by lane over the n vectors, then the lanes as a tree (8, 4, 2, 1)."""

    @intrinsic
    def reduction(typingctx, array, b, n):
        signature = types.float32(array, types.intp, types.intp)

        def codegen(context, builder, signature, args):
            array, b, n = args
            lane = ir.IntType(32)
            result = cgutils.alloca_once_value(builder, ir.Constant(_VECTOR, [start] * CPU_VECTOR))
            with cgutils.for_range(builder, n) as loop:
                index = builder.add(b, builder.mul(loop.index, n.type(CPU_VECTOR)))
                source = _pointer(context, builder, signature.args[0], array, index)
                values = builder.load(builder.bitcast(source, _VECTOR.as_pointer()), align=4)
                builder.store(combine(builder, values, builder.load(result)), result)
            lanes = builder.load(result)
            for half in (8, 4, 2, 1):
                order = ir.Constant(
                    ir.VectorType(lane, CPU_VECTOR), [(i + half) % CPU_VECTOR for i in range(CPU_VECTOR)]
                )
                lanes = combine(builder, builder.shuffle_vector(lanes, lanes, order), lanes)
            return builder.extract_element(lanes, lane(0))

        return signature, codegen

    return reduction


_vector_sum = _reduction(0.0, lambda builder, x, y: builder.fadd(x, y))
_vector_max = _reduction(float("-inf"), lambda builder, x, y: builder.select(builder.fcmp_ordered(">", x, y), x, y))


def _fma_rows(accumulate):
    """`_fma_chain` for any number of rows."""
    one, two, four = (_fma_chain(num_rows, accumulate) for num_rows in (1, 2, 4))

    @inline_njit
    def rows(num_rows, acc, a, acc_stride, coefficients, c, coefficient_stride, memory, m, memory_stride, n):
        quads = num_rows // 4 * 4
        for r in range(0, quads, 4):
            a_r, c_r = a + r * acc_stride, c + r * coefficient_stride
            four(acc, a_r, acc_stride, coefficients, c_r, coefficient_stride, memory, m, memory_stride, n)
        a, c, left = a + quads * acc_stride, c + quads * coefficient_stride, num_rows - quads
        if left >= 2:
            two(acc, a, acc_stride, coefficients, c, coefficient_stride, memory, m, memory_stride, n)
        if left % 2:
            a_r, c_r = a + (left - 1) * acc_stride, c + (left - 1) * coefficient_stride
            one(acc, a_r, acc_stride, coefficients, c_r, coefficient_stride, memory, m, memory_stride, n)

    return rows


_set_rows, _add_to_rows = _fma_rows(accumulate=False), _fma_rows(accumulate=True)


@inline_njit
def _fill(array, value):
    for i in range(array.size):
        array[i] = value


@inline_njit
def _copy(source, target):
    for i in range(target.size):
        target[i] = source[i]


@inline_njit
def _softmax(scores, low, high, scale):
    """Turn scores into exp(scale * score - m), 0 outside [low, high); returns (m, their sum).

    The number of scores is a multiple of 16. A column's lane is its absolute position modulo 16, as splits and `scores`
    begin at multiples of 16.
    """
    _fill(scores[:low], _NEGATIVE_INFINITY)
    _fill(scores[high:], _NEGATIVE_INFINITY)
    m = scale * _vector_max(scores, 0, scores.size // CPU_VECTOR)
    for i in range(scores.size):
        x = fma32(scores[i], scale, -m)
        p = exp32(_EXP_LOWEST if x < _EXP_LOWEST else x)
        scores[i] = _ZERO if x < _EXP_LOWEST else p
    return m, _vector_sum(scores, 0, scores.size // CPU_VECTOR)


@inline_njit
def _merge(part, part_max, part_sum, total, total_max, total_sum):
    """Fold a split's (output, max, sum) into the row's; `total` changes in place, the new max and sum are returned."""
    if total_sum == _ZERO:
        for i in range(part.size):
            total[i] = part[i]
        return part_max, part_sum
    m = part_max if part_max > total_max else total_max
    old, new = exp32(total_max - m), exp32(part_max - m)
    for i in range(part.size):
        total[i] = fma32(part[i], new, total[i] * old)
    return m, fma32(part_sum, new, total_sum * old)


@inline_njit
def _normalise(total, total_sum, out):
    for i in range(out.size):
        out[i] = total[i] / total_sum


@inline_njit
def _visible(position, split, split_end, window):
    """The positions [low, high) of a split that the query at `position` sees."""
    return max(split, position - window + 1), min(split_end, position + 1)


@inline_njit
def _attend_tile(tile, caches, shape, scale, window, scratch):
    """The rows of consecutive tokens of one request and one KV group, in one pass over their pages.

    Leaves the not yet normalised outputs, the maxima and the sums in `scratch`.
    """
    kv_head, tokens, first_position = tile
    k_memory, v_memory, pages = caches
    group, num_kv_heads, page_size, head_dim, row_stride = shape
    queries, scores, part, part_max, part_sum, total, total_max, total_sum = scratch
    _fill(total_sum, _ZERO)
    lowest, visible_end = max(0, first_position - window + 1), first_position + tokens
    for split in range(lowest // SPLIT * SPLIT, visible_end, SPLIT):
        split_end = min(split + SPLIT, visible_end)
        first_page, end_page = max(split, lowest) // page_size, (split_end - 1) // page_size + 1
        for page in range(first_page, end_page):
            key = (pages[page] * num_kv_heads + kv_head) * page_size * head_dim
            first_row = max(0, page * page_size - first_position) * group
            column = page * page_size - split + MARGIN
            # A whole vector is written even if the page ends within it; what is beyond is overwritten or masked.
            for i in range(0, page_size, CPU_VECTOR):
                _set_rows(
                    tokens * group - first_row,
                    *(scores, first_row * SCORE_STRIDE + column + i, SCORE_STRIDE),
                    *(queries, first_row * head_dim, head_dim),
                    *(k_memory, key + i, page_size, head_dim),
                )
        for t in range(tokens):
            low, high = _visible(first_position + t, split, split_end, window)
            if low >= high:
                continue
            begin, end = (low - split) // CPU_VECTOR * CPU_VECTOR, -(-(high - split) // CPU_VECTOR) * CPU_VECTOR
            for r in range(t * group, (t + 1) * group):
                base = r * SCORE_STRIDE + MARGIN
                row = scores[base + begin : base + end]
                m, s = _softmax(row, low - split - begin, high - split - begin, scale)
                part_max[r], part_sum[r] = m, s
        _fill(part[: tokens * group * row_stride], _ZERO)
        for page in range(first_page, end_page):
            page_begin = page * page_size
            value = (pages[page] * num_kv_heads + kv_head) * page_size * head_dim
            for t in range(max(0, page_begin - first_position), tokens):
                low, high = _visible(first_position + t, split, split_end, window)
                low, high = max(low, page_begin), min(high, page_begin + page_size)
                for d in range(0, head_dim, CPU_VECTOR):
                    _add_to_rows(
                        group,
                        *(part, t * group * row_stride + d, row_stride),
                        *(scores, t * group * SCORE_STRIDE + low - split + MARGIN, SCORE_STRIDE),
                        *(v_memory, value + (low - page_begin) * head_dim + d, head_dim, high - low),
                    )
        for t in range(tokens):
            low, high = _visible(first_position + t, split, split_end, window)
            if low >= high:
                continue
            for r in range(t * group, (t + 1) * group):
                first, last = r * row_stride, r * row_stride + head_dim
                total_max[r], total_sum[r] = _merge(
                    *(part[first:last], part_max[r], part_sum[r], total[first:last], total_max[r], total_sum[r])
                )


@njit
def _attend(start, stop, q, k_memory, v_memory, page_table, cu_seqlens, kv_lens, out, lse, sizes, scale, window):
    """Rows [start, stop) of the [num_kv_heads, T] query rows; a row is a token's heads of one KV group."""
    num_tokens, num_heads, num_kv_heads, page_size, head_dim = sizes
    q, out = q.reshape(-1), out.reshape(-1)
    group = num_heads // num_kv_heads
    tile_tokens = max(1, TILE_ROWS // group)
    tile_rows = tile_tokens * group
    row_stride = (head_dim + CPU_VECTOR - 1) // CPU_VECTOR * CPU_VECTOR
    queries = np.empty(tile_rows * head_dim, np.float32)
    scores = np.empty(tile_rows * SCORE_STRIDE, np.float32)
    part, total = np.empty(tile_rows * row_stride, np.float32), np.empty(tile_rows * row_stride, np.float32)
    part_max, part_sum = np.empty(tile_rows, np.float32), np.empty(tile_rows, np.float32)
    total_max, total_sum = np.empty(tile_rows, np.float32), np.empty(tile_rows, np.float32)
    scratch = (queries, scores, part, part_max, part_sum, total, total_max, total_sum)
    shape = (group, num_kv_heads, page_size, head_dim, row_stride)
    row, request = start, 0
    while row < stop:
        kv_head, token = row // num_tokens, row % num_tokens
        if token < cu_seqlens[request]:
            request = 0
        while request < kv_lens.size and cu_seqlens[request + 1] <= token:
            request += 1
        if request == kv_lens.size:
            row, request = (kv_head + 1) * num_tokens, 0
            continue
        tokens = min(tile_tokens, stop - row, cu_seqlens[request + 1] - token)
        first_position = kv_lens[request] - cu_seqlens[request + 1] + token
        if first_position < token - cu_seqlens[request] or kv_lens[request] > page_table.shape[1] * page_size:
            raise ValueError("attention: kv_lens does not fit the queries or the page table")
        first_head = kv_head * group
        for t in range(tokens):
            source = ((token + t) * num_heads + first_head) * head_dim
            target = t * group * head_dim
            _copy(q[source : source + group * head_dim], queries[target : target + group * head_dim])
        tile = (kv_head, tokens, first_position)
        _attend_tile(tile, (k_memory, v_memory, page_table[request]), shape, scale, window, scratch)
        for r in range(tokens * group):
            t, head = token + r // group, first_head + r % group
            target = (t * num_heads + head) * head_dim
            _normalise(total[r * row_stride :], total_sum[r], out[target : target + head_dim])
            if lse.size:
                lse[head, t] = total_max[r] + log32(total_sum[r])
        row += tokens
