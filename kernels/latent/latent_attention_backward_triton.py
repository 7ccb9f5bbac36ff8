"""Backward of packed latent attention on the GPU: two deterministic Triton kernels without atomics.

Both recompute P = exp(scale * q k^T - lse) tile by tile, k being whole rows and v their first columns. With
dP = dO v^T, delta = sum(dO * O), dS = P * (dP - delta): dq = scale * dS k; a row's gradient is scale * dS^T q, and in
its first columns P^T dO besides.
"""

import torch
import triton
import triton.language as tl

from lockstep.kernels.attention.attention_triton import LOG2_E, locate_tile
from lockstep.kernels.latent.latent_attention_triton import block_sizes, load_columns


def latent_attention_backward(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    rows: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    cu_seqlens: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients (dq, drows) of `latent_attention_packed`; lse: [H, T] fp32, the other shapes as there."""
    num_tokens, num_heads, width = q.shape
    value_dim, num_requests = out.shape[2], cu_seqlens.shape[0] - 1
    grad_out, q, rows = (x.contiguous() for x in (grad_out, q, rows))
    dq, drows = torch.empty_like(q), torch.empty_like(rows)
    if num_tokens == 0:
        return dq, drows
    delta = (grad_out.float() * out.float()).sum(-1).T.contiguous()
    tile = 32 if q.element_size() == 2 else 16
    inputs = (q, rows, grad_out, lse, delta, cu_seqlens, cu_seqlens.diff(), num_requests, num_tokens, scale)
    sizes = {
        "NUM_HEADS": num_heads,
        "WIDTH": width,
        "VALUE_DIM": value_dim,
        **block_sizes(width, value_dim),
        "BLOCK_REQUESTS": triton.next_power_of_2(num_requests),
        "TILE": tile,
        "num_warps": 8,
        "num_stages": 1,
    }
    _dq_kernel[(num_tokens * num_heads // tile + num_requests,)](*inputs, dq, **sizes)
    _drows_kernel[(num_tokens // tile + num_requests,)](*inputs, drows, **sizes)
    return dq, drows


@triton.jit
def _load_row(ptr, offsets, exists, WIDTH: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_VALUE: tl.constexpr,
              BLOCK_REST: tl.constexpr):  # fmt: skip
    """The two blocks of columns of rows; without a rest, the second is a copy that nothing reads."""
    value = load_columns(ptr, offsets, exists, 0, VALUE_DIM, BLOCK_VALUE)
    rest = value
    if BLOCK_REST > 0:
        rest = load_columns(ptr, offsets, exists, VALUE_DIM, WIDTH, BLOCK_REST)
    return value, rest


@triton.jit
def _store_columns(ptr, offsets, exists, x, FIRST: tl.constexpr, END: tl.constexpr, BLOCK: tl.constexpr):
    column = FIRST + tl.arange(0, BLOCK)
    mask = exists[:, None] & (column < END)[None, :]
    tl.store(ptr + offsets[:, None] + column[None, :], x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _weights_and_grad_scores(
    q_value, q_rest, value, rest, grad_out, lse, delta, visible, scale, BLOCK_REST: tl.constexpr, LOG2_E: tl.constexpr
):
    """P and scale * dS of a tile [queries, keys]."""
    scores = tl.dot(q_value, tl.trans(value), input_precision="ieee")
    if BLOCK_REST > 0:
        scores = tl.dot(q_rest, tl.trans(rest), scores, input_precision="ieee")
    weights = tl.where(visible, tl.exp2((scores * scale - lse[:, None]) * LOG2_E), 0.0)
    grad_weights = tl.dot(grad_out, tl.trans(value), input_precision="ieee")
    return weights, weights * (grad_weights - delta[:, None]) * scale


@triton.jit
def _dq_kernel(
    q_ptr, rows_ptr, grad_out_ptr, lse_ptr, delta_ptr, cu_seqlens_ptr, lengths_ptr, num_requests, num_tokens, scale,
    dq_ptr, NUM_HEADS: tl.constexpr, WIDTH: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_VALUE: tl.constexpr,
    BLOCK_REST: tl.constexpr, BLOCK_REQUESTS: tl.constexpr, TILE: tl.constexpr, LOG2_E: tl.constexpr = LOG2_E,
):  # fmt: skip
    request, token, head, position = locate_tile(
        cu_seqlens_ptr, lengths_ptr, num_requests, NUM_HEADS, TILE, BLOCK_REQUESTS
    )
    high = tl.max(position, 0) + 1
    if high == 0:
        return
    exists = position >= 0
    head_rows = token.to(tl.int64) * NUM_HEADS + head
    q_value, q_rest = _load_row(q_ptr, head_rows * WIDTH, exists, WIDTH, VALUE_DIM, BLOCK_VALUE, BLOCK_REST)
    grad_out = load_columns(grad_out_ptr, head_rows * VALUE_DIM, exists, 0, VALUE_DIM, BLOCK_VALUE)
    lse = tl.load(lse_ptr + head * num_tokens + token, mask=exists, other=0.0)
    delta = tl.load(delta_ptr + head * num_tokens + token, mask=exists, other=0.0)
    begin = tl.load(cu_seqlens_ptr + request).to(tl.int64)
    dq_value = tl.zeros((TILE, BLOCK_VALUE), tl.float32)
    dq_rest = tl.zeros((TILE, BLOCK_REST if BLOCK_REST > 0 else 1), tl.float32)
    for first in range(0, high, TILE):
        key = first + tl.arange(0, TILE)
        value, rest = _load_row(rows_ptr, (begin + key) * WIDTH, key < high, WIDTH, VALUE_DIM, BLOCK_VALUE, BLOCK_REST)
        visible = (key[None, :] <= position[:, None]) & exists[:, None]
        _, grad_scores = _weights_and_grad_scores(
            q_value, q_rest, value, rest, grad_out, lse, delta, visible, scale, BLOCK_REST, LOG2_E
        )
        grad_scores = grad_scores.to(value.dtype)
        dq_value = tl.dot(grad_scores, value, dq_value, input_precision="ieee")
        if BLOCK_REST > 0:
            dq_rest = tl.dot(grad_scores, rest, dq_rest, input_precision="ieee")
    _store_columns(dq_ptr, head_rows * WIDTH, exists, dq_value, 0, VALUE_DIM, BLOCK_VALUE)
    if BLOCK_REST > 0:
        _store_columns(dq_ptr, head_rows * WIDTH, exists, dq_rest, VALUE_DIM, WIDTH, BLOCK_REST)


@triton.jit
def _drows_kernel(
    q_ptr, rows_ptr, grad_out_ptr, lse_ptr, delta_ptr, cu_seqlens_ptr, lengths_ptr, num_requests, num_tokens, scale,
    drows_ptr, NUM_HEADS: tl.constexpr, WIDTH: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_VALUE: tl.constexpr,
    BLOCK_REST: tl.constexpr, BLOCK_REQUESTS: tl.constexpr, TILE: tl.constexpr, LOG2_E: tl.constexpr = LOG2_E,
):  # fmt: skip
    request, key_token, _, key = locate_tile(cu_seqlens_ptr, lengths_ptr, num_requests, 1, TILE, BLOCK_REQUESTS)
    high = tl.max(key, 0) + 1
    if high == 0:
        return
    key_exists = key >= 0
    key_rows = key_token.to(tl.int64) * WIDTH
    value, rest = _load_row(rows_ptr, key_rows, key_exists, WIDTH, VALUE_DIM, BLOCK_VALUE, BLOCK_REST)
    begin = tl.load(cu_seqlens_ptr + request)
    end_query = tl.load(lengths_ptr + request)
    first_query = (high - 1) // TILE * TILE
    dvalue = tl.zeros((TILE, BLOCK_VALUE), tl.float32)
    drest = tl.zeros((TILE, BLOCK_REST if BLOCK_REST > 0 else 1), tl.float32)
    for first in range(first_query * NUM_HEADS, end_query * NUM_HEADS, TILE):
        row = first + tl.arange(0, TILE)
        position, head = row // NUM_HEADS, row % NUM_HEADS
        exists = position < end_query
        token = begin + position
        head_rows = token.to(tl.int64) * NUM_HEADS + head
        q_value, q_rest = _load_row(q_ptr, head_rows * WIDTH, exists, WIDTH, VALUE_DIM, BLOCK_VALUE, BLOCK_REST)
        grad_out = load_columns(grad_out_ptr, head_rows * VALUE_DIM, exists, 0, VALUE_DIM, BLOCK_VALUE)
        lse = tl.load(lse_ptr + head * num_tokens + token, mask=exists, other=0.0)
        delta = tl.load(delta_ptr + head * num_tokens + token, mask=exists, other=0.0)
        visible = (key[None, :] <= position[:, None]) & exists[:, None] & key_exists[None, :]
        weights, grad_scores = _weights_and_grad_scores(
            q_value, q_rest, value, rest, grad_out, lse, delta, visible, scale, BLOCK_REST, LOG2_E
        )
        grad_scores = tl.trans(grad_scores.to(q_value.dtype))
        dvalue = tl.dot(tl.trans(weights.to(q_value.dtype)), grad_out, dvalue, input_precision="ieee")
        dvalue = tl.dot(grad_scores, q_value, dvalue, input_precision="ieee")
        if BLOCK_REST > 0:
            drest = tl.dot(grad_scores, q_rest, drest, input_precision="ieee")
    _store_columns(drows_ptr, key_rows, key_exists, dvalue, 0, VALUE_DIM, BLOCK_VALUE)
    if BLOCK_REST > 0:
        _store_columns(drows_ptr, key_rows, key_exists, drest, VALUE_DIM, WIDTH, BLOCK_REST)
