"""Backward of packed attention on the GPU: two deterministic Triton kernels without atomics, for dq and for dk, dv.

Both recompute P = exp(scale * q k^T - lse) tile by tile. With dP = dO v^T, delta = sum(dO * O),
dS = P * (dP - delta): dv = P^T dO, dq = scale * dS k, dk = scale * dS^T q.
"""

import torch
import triton
import triton.language as tl

from lockstep.kernels.attention.attention_triton import LOG2_E, locate_tile, visible_span


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
    """Gradients (dq, dk, dv) of `attention_packed`; lse: [H, T] fp32, the other shapes as there."""
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads, num_requests = k.shape[1], cu_seqlens.shape[0] - 1
    grad_out, q, k, v = (x.contiguous() for x in (grad_out, q, k, v))
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    if num_tokens == 0:
        return dq, dk, dv
    delta = (grad_out.float() * out.float()).sum(-1).T.contiguous()
    block_dim = max(16, triton.next_power_of_2(head_dim))
    tile = 64 if block_dim * q.element_size() <= 256 else 32
    group = num_heads // num_kv_heads
    inputs = (q, k, v, grad_out, lse, delta, cu_seqlens, cu_seqlens.diff(), num_requests, num_tokens, scale)
    sizes = {
        "NUM_HEADS": num_heads,
        "NUM_KV_HEADS": num_kv_heads,
        "HEAD_DIM": head_dim,
        "BLOCK_DIM": block_dim,
        "BLOCK_REQUESTS": triton.next_power_of_2(num_requests),
        "QUERY_TILE": tile,
        "KEY_TILE": tile,
        "WINDOW": window or 0,
        "num_warps": 4,
        "num_stages": 1,
    }
    _dq_kernel[(num_tokens * group // tile + num_requests, num_kv_heads)](*inputs, dq, **sizes)
    _dkv_kernel[(num_tokens // tile + num_requests, num_kv_heads)](*inputs, dk, dv, **sizes)
    return dq, dk, dv


@triton.jit
def _load_rows(ptr, token, head, exists, NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """Rows [token, head] of a contiguous [T, NUM_HEADS, HEAD_DIM] tensor as a tile, 0 where none exists."""
    d = tl.arange(0, BLOCK_DIM)
    rows = (token.to(tl.int64) * NUM_HEADS + head) * HEAD_DIM
    return tl.load(ptr + rows[:, None] + d[None, :], mask=exists[:, None] & (d < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def _store_rows(
    ptr, value, token, head, exists, NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr
):
    d = tl.arange(0, BLOCK_DIM)
    rows = (token.to(tl.int64) * NUM_HEADS + head) * HEAD_DIM
    value = value.to(ptr.dtype.element_ty)
    tl.store(ptr + rows[:, None] + d[None, :], value, mask=exists[:, None] & (d < HEAD_DIM)[None, :])


@triton.jit
def _weights_and_grad_scores(
    q, k, v, grad_out, lse, delta, distance, exists, scale, LOG2_E: tl.constexpr, WINDOW: tl.constexpr
):
    """P and dS of a tile [queries, keys]; distance is query position - key position."""
    visible = (distance >= 0) & exists
    if WINDOW > 0:
        visible = visible & (distance < WINDOW)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    weights = tl.where(visible, tl.exp2((scores - lse[:, None]) * LOG2_E), 0.0)
    grad_weights = tl.dot(grad_out, tl.trans(v), input_precision="ieee")
    return weights, weights * (grad_weights - delta[:, None])


@triton.jit
def _dq_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    grad_out_ptr,
    lse_ptr,
    delta_ptr,
    cu_seqlens_ptr,
    lengths_ptr,
    num_requests,
    num_tokens,
    scale,
    dq_ptr,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_REQUESTS: tl.constexpr,
    QUERY_TILE: tl.constexpr,
    KEY_TILE: tl.constexpr,
    WINDOW: tl.constexpr,
    LOG2_E: tl.constexpr = LOG2_E,
):
    GROUP: tl.constexpr = NUM_HEADS // NUM_KV_HEADS
    kv_head = tl.program_id(1)
    request, token, head, position = locate_tile(
        cu_seqlens_ptr, lengths_ptr, num_requests, GROUP, QUERY_TILE, BLOCK_REQUESTS
    )
    low, high = visible_span(position, WINDOW)
    if high == 0:
        return
    head += kv_head * GROUP
    exists = position >= 0
    q = _load_rows(q_ptr, token, head, exists, NUM_HEADS, HEAD_DIM, BLOCK_DIM)
    grad_out = _load_rows(grad_out_ptr, token, head, exists, NUM_HEADS, HEAD_DIM, BLOCK_DIM)
    lse = tl.load(lse_ptr + head * num_tokens + token, mask=exists, other=0.0)
    delta = tl.load(delta_ptr + head * num_tokens + token, mask=exists, other=0.0)
    begin = tl.load(cu_seqlens_ptr + request)
    dq = tl.zeros((QUERY_TILE, BLOCK_DIM), tl.float32)
    for first in range(low // KEY_TILE * KEY_TILE, high, KEY_TILE):
        key = first + tl.arange(0, KEY_TILE)
        k = _load_rows(k_ptr, begin + key, kv_head, key < high, NUM_KV_HEADS, HEAD_DIM, BLOCK_DIM)
        v = _load_rows(v_ptr, begin + key, kv_head, key < high, NUM_KV_HEADS, HEAD_DIM, BLOCK_DIM)
        distance = position[:, None] - key[None, :]
        _, grad_scores = _weights_and_grad_scores(
            q, k, v, grad_out, lse, delta, distance, exists[:, None], scale, LOG2_E, WINDOW
        )
        dq = tl.dot(grad_scores.to(k.dtype), k, dq, input_precision="ieee")
    _store_rows(dq_ptr, dq * scale, token, head, exists, NUM_HEADS, HEAD_DIM, BLOCK_DIM)


@triton.jit
def _dkv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    grad_out_ptr,
    lse_ptr,
    delta_ptr,
    cu_seqlens_ptr,
    lengths_ptr,
    num_requests,
    num_tokens,
    scale,
    dk_ptr,
    dv_ptr,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_REQUESTS: tl.constexpr,
    QUERY_TILE: tl.constexpr,
    KEY_TILE: tl.constexpr,
    WINDOW: tl.constexpr,
    LOG2_E: tl.constexpr = LOG2_E,
):
    GROUP: tl.constexpr = NUM_HEADS // NUM_KV_HEADS
    kv_head = tl.program_id(1)
    request, key_token, _, key = locate_tile(cu_seqlens_ptr, lengths_ptr, num_requests, 1, KEY_TILE, BLOCK_REQUESTS)
    high = tl.max(key, 0) + 1
    if high == 0:
        return
    key_exists = key >= 0
    k = _load_rows(k_ptr, key_token, kv_head, key_exists, NUM_KV_HEADS, HEAD_DIM, BLOCK_DIM)
    v = _load_rows(v_ptr, key_token, kv_head, key_exists, NUM_KV_HEADS, HEAD_DIM, BLOCK_DIM)
    begin = tl.load(cu_seqlens_ptr + request)
    first_query = (high - 1) // KEY_TILE * KEY_TILE
    end_query = tl.load(lengths_ptr + request)
    if WINDOW > 0:
        end_query = tl.minimum(end_query, high - 1 + WINDOW)
    dk = tl.zeros((KEY_TILE, BLOCK_DIM), tl.float32)
    dv = tl.zeros((KEY_TILE, BLOCK_DIM), tl.float32)
    for first in range(first_query * GROUP, end_query * GROUP, QUERY_TILE):
        row = first + tl.arange(0, QUERY_TILE)
        position, head = row // GROUP, kv_head * GROUP + row % GROUP
        exists = position < end_query
        token = begin + position
        q = _load_rows(q_ptr, token, head, exists, NUM_HEADS, HEAD_DIM, BLOCK_DIM)
        grad_out = _load_rows(grad_out_ptr, token, head, exists, NUM_HEADS, HEAD_DIM, BLOCK_DIM)
        lse = tl.load(lse_ptr + head * num_tokens + token, mask=exists, other=0.0)
        delta = tl.load(delta_ptr + head * num_tokens + token, mask=exists, other=0.0)
        distance = position[:, None] - key[None, :]
        pairs = exists[:, None] & key_exists[None, :]
        weights, grad_scores = _weights_and_grad_scores(
            q, k, v, grad_out, lse, delta, distance, pairs, scale, LOG2_E, WINDOW
        )
        dv = tl.dot(tl.trans(weights.to(q.dtype)), grad_out, dv, input_precision="ieee")
        dk = tl.dot(tl.trans(grad_scores.to(q.dtype)), q, dk, input_precision="ieee")
    _store_rows(dk_ptr, dk * scale, key_token, kv_head, key_exists, NUM_KV_HEADS, HEAD_DIM, BLOCK_DIM)
    _store_rows(dv_ptr, dv, key_token, kv_head, key_exists, NUM_KV_HEADS, HEAD_DIM, BLOCK_DIM)
