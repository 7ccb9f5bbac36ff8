"""The gradients of packed attention on the CPU: a numba kernel whose unit is a KV head of a sequence."""

import numpy as np
import torch

from lockstep.kernels._cpu import exp32, inline_njit, njit, parallel_rows
from lockstep.kernels._cpu_vectors import add_products, at, copy, fill, pointer
from lockstep.kernels.memory.kv_cache import CPU_VECTOR

QUERY_BLOCK = 32  # tokens whose scores exist at a time
MIN_PAIRS_PER_THREAD = 50_000  # of a query and a key

_ZERO = np.float32(0.0)


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
    """Gradients (dq, dk, dv) of `attention_packed` on the CPU; deterministic, whatever the number of threads.

        P = exp(scale * q k^T - lse);  dv = P^T dO;  dS = scale * P * (dO v^T - rowsum(dO * out))
        dq = dS k;  dk = dS^T q

    v and out may have another last dimension than q and k.
    """
    (num_tokens, num_heads, head_dim), num_kv_heads, value_dim = q.shape, k.shape[1], v.shape[2]
    dq, dk, dv = (torch.zeros(x.shape, dtype=torch.float32, device="cpu") for x in (q, k, v))
    num_sequences = cu_seqlens.numel() - 1
    longest = int(cu_seqlens.diff().max()) if num_sequences else 0
    if longest == 0:
        return dq, dk, dv
    pairs_per_unit = max(1, num_tokens // num_sequences) ** 2 * num_heads // num_kv_heads
    parallel_rows(
        _backward_units,
        num_sequences * num_kv_heads,
        -(-MIN_PAIRS_PER_THREAD // pairs_per_unit),
        *(x.detach().contiguous().numpy() for x in (grad_out, q, k, v, out, lse, cu_seqlens)),
        *(x.numpy() for x in (dq, dk, dv)),
        (num_tokens, num_heads, num_kv_heads, head_dim, value_dim, longest),
        np.float32(scale),
        window or 1 << 40,
    )
    return dq, dk, dv


@inline_njit
def _round_up(size):
    return (size + CPU_VECTOR - 1) // CPU_VECTOR * CPU_VECTOR


@inline_njit
def _copy_rows(num_rows, size, source, target):
    """source, target: pointers, and the floats from one row to the next."""
    for r in range(num_rows):
        copy(at(source[0], r * source[1]), at(target[0], r * target[1]), size)


@inline_njit
def _transpose(num_rows, size, source, target):
    """As _copy_rows; `size` rows of the target are the source's columns."""
    for r in range(num_rows):
        for i in range(size):
            target[0][i * target[1] + r] = source[0][r * source[1] + i]


@inline_njit
def _multiply(num_rows, n, size, sums, factors, source):
    """sums[num_rows, size] += factors[num_rows, n] @ source[n, size], each a pointer and the floats from row to row.

    `size` is rounded up to whole vectors.
    """
    sums_rows, sums_stride, offsets = sums
    source_rows, source_stride = source
    add_products(
        num_rows, (sums_rows, sums_stride, offsets), factors, (source_rows, source_stride, offsets),
        *(_round_up(size) // CPU_VECTOR, n),
    )  # fmt: skip


@inline_njit
def _weigh(size, visible, scores, products, lse, delta, scale):
    """A query's scores q k^T and products dO v^T at `size` keys become its rows of P and of dS."""
    for j in range(size):
        scores[j] = exp32(scale * scores[j] - lse)
        products[j] = scale * scores[j] * (products[j] - delta)
    for row in (scores, products):
        fill(row, 0, visible[0], _ZERO)
        fill(row, visible[1], size, _ZERO)


@njit
def _backward_units(start, stop, grad_out, q, k, v, out, lse, cu_seqlens, dq, dk, dv, sizes, scale, window):
    """Units [start, stop) of [num_sequences, num_kv_heads]. Rows in scratch memory are padded to whole vectors."""
    num_tokens, num_heads, num_kv_heads, head_dim, value_dim, longest = sizes
    group = num_heads // num_kv_heads
    width, value_width, span = _round_up(head_dim), _round_up(value_dim), _round_up(longest)
    block = min(QUERY_BLOCK, longest) * group
    offsets_memory = np.arange(0, max(width, value_width, span), CPU_VECTOR)
    memory = np.zeros(span * (3 * width + 2 * value_width) + block * (2 * width + value_width + 4 * span), np.float32)
    offsets, keys = pointer(offsets_memory), pointer(memory)
    dkeys = at(keys, span * width)
    dvalues = at(dkeys, span * width)
    key_columns = at(dvalues, span * value_width)
    value_columns = at(key_columns, span * width)
    queries = at(value_columns, span * value_width)
    dqueries = at(queries, block * width)
    grads = at(dqueries, block * width)
    weights = at(grads, block * value_width)  # P and dS, and both with a row per key
    dscores = at(weights, block * span)
    weights_by_key = at(dscores, block * span)
    dscores_by_key = at(weights_by_key, block * span)
    for unit in range(start, stop):
        sequence, kv_head = unit // num_kv_heads, unit % num_kv_heads
        begin = np.int64(cu_seqlens[sequence])
        length = cu_seqlens[sequence + 1] - begin
        first_row = begin * num_kv_heads + kv_head
        key_rows = (at(pointer(k), first_row * head_dim), num_kv_heads * head_dim)
        value_rows = (at(pointer(v), first_row * value_dim), num_kv_heads * value_dim)
        # What lies beyond the sequence is multiplied by weights of 0.
        fill(keys, length * width, _round_up(length) * width, _ZERO)
        _copy_rows(length, head_dim, key_rows, (keys, width))
        _transpose(length, head_dim, key_rows, (key_columns, span))
        _transpose(length, value_dim, value_rows, (value_columns, span))
        fill(dkeys, 0, _round_up(length) * width, _ZERO)
        fill(dvalues, 0, _round_up(length) * value_width, _ZERO)
        for first in range(0, length, QUERY_BLOCK):
            end = min(first + QUERY_BLOCK, length)
            rows = (end - first) * group
            low, high = max(0, first - window + 1) // CPU_VECTOR * CPU_VECTOR, _round_up(end)
            size = high - low
            for t in range(end - first):
                head, r = (begin + first + t) * num_heads + kv_head * group, t * group
                _copy_rows(
                    group, head_dim, (at(pointer(q), head * head_dim), head_dim), (at(queries, r * width), width)
                )  # fmt: skip
                _copy_rows(
                    *(group, value_dim, (at(pointer(grad_out), head * value_dim), value_dim)),
                    (at(grads, r * value_width), value_width),
                )
            fill(weights, 0, rows * span, _ZERO)
            fill(dscores, 0, rows * span, _ZERO)
            fill(dqueries, 0, rows * width, _ZERO)
            _multiply(rows, head_dim, size, (weights, span, offsets), (queries, width), (at(key_columns, low), span))
            _multiply(
                rows, value_dim, size, (dscores, span, offsets), (grads, value_width), (at(value_columns, low), span)
            )  # fmt: skip
            for r in range(rows):
                token, head = first + r // group, kv_head * group + r % group
                grad = at(grads, r * value_width)
                output = at(pointer(out), ((begin + token) * num_heads + head) * value_dim)
                delta = _ZERO
                for i in range(value_dim):
                    delta += grad[i] * output[i]
                visible = (max(0, token - window + 1 - low), token + 1 - low)
                row_lse = pointer(lse)[head * num_tokens + begin + token]
                _weigh(size, visible, at(weights, r * span), at(dscores, r * span), row_lse, delta, scale)
            _transpose(rows, size, (weights, span), (weights_by_key, block))
            _transpose(rows, size, (dscores, span), (dscores_by_key, block))
            _multiply(rows, size, width, (dqueries, width, offsets), (dscores, span), (at(keys, low * width), width))
            _multiply(
                *(size, rows, width, (at(dkeys, low * width), width, offsets)),
                *((dscores_by_key, block), (queries, width)),
            )
            _multiply(
                *(size, rows, value_width, (at(dvalues, low * value_width), value_width, offsets)),
                *((weights_by_key, block), (grads, value_width)),
            )
            for t in range(end - first):
                head = (begin + first + t) * num_heads + kv_head * group
                _copy_rows(
                    *(group, head_dim, (at(dqueries, t * group * width), width)),
                    (at(pointer(dq), head * head_dim), head_dim),
                )
        _copy_rows(length, head_dim, (dkeys, width), (at(pointer(dk), first_row * head_dim), key_rows[1]))
        _copy_rows(length, value_dim, (dvalues, value_width), (at(pointer(dv), first_row * value_dim), value_rows[1]))
