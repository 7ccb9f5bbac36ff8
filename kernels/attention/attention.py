"""Causal attention over a paged KV cache: prefill, chunked prefill, decode and the trainer's packed batches are one op.

The row contract: the bits of an output row (one query token, one head) depend on that query row, the keys and values
at positions up to its own, `scale` and `window`; not on the batch, the chunking, the pages or the number of threads.
"""

import itertools

import torch

from lockstep.kernels.attention import attention_flash_backward
from lockstep.kernels.attention.attention_cpu import attention_forward as _forward_cpu
from lockstep.kernels.attention.attention_cpu_backward import attention_backward as _backward_cpu
from lockstep.kernels.attention.attention_decode_triton import MAX_TILE_ROWS
from lockstep.kernels.attention.attention_decode_triton import decode_forward as _decode_triton
from lockstep.kernels.attention.attention_plan import AttentionPlan
from lockstep.kernels.attention.attention_triton import attention_forward as _forward_triton
from lockstep.kernels.attention.attention_triton_backward import attention_backward as _backward_triton
from lockstep.kernels.memory.kv_cache import kv_store, new_kv_cache

# Pages of the copy that `attention_packed` makes of its keys and values. No bit depends on it.
PACKED_PAGE_SIZE = {"cpu": 16, "cuda": 64}


def attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    kv_lens: torch.Tensor,
    scale: float,
    window: int | None = None,
    plan: AttentionPlan | None = None,
) -> torch.Tensor:
    """Attend with the last tokens of each request to all of its cached tokens so far (their own keys included).

        for b in range(B):
            for t in range(cu_seqlens_q[b], cu_seqlens_q[b + 1]):
                i = kv_lens[b] - cu_seqlens_q[b + 1] + t                     # the position of the query
                j = positions with i - window < j <= i
                page, offset = page_table[b, j // page_size], j % page_size
                out[t, h] = softmax(scale * q[t, h] @ k_cache[page, g, offset].T) @ v_cache[page, g, offset]
                                                                             # g = h // (H // HKV)

    q: [T, H, D]; k_cache, v_cache: from `new_kv_cache`; page_table: [B, MP] int32, those past a request's pages are not
    read; cu_seqlens_q: [B + 1] int32, cu_seqlens_q[B] <= T, equal neighbours are padding requests; kv_lens: [B] int32,
    at least the request's number of queries. Returns [T, H, D]; rows past cu_seqlens_q[B] are undefined. No autograd.
    Cache slots that hold no visible token may hold anything. One limit, on a GPU: a NaN or infinity in v at a later
    position of the *same call's* tokens of a request reaches the earlier rows of that request.
    plan: from `plan_attention` for these requests; computes batches of few queries per request fast, with the same bits
    (on a GPU; the CPU does not need one). Raises ValueError for shapes, dtypes, a scale or a window that do not fit.
    """
    _check(q, k_cache.shape[1], k_cache.shape[3], k_cache.dtype, scale, window)
    num_requests = kv_lens.shape[0]
    if page_table.ndim != 2 or page_table.shape[0] != num_requests or cu_seqlens_q.shape != (num_requests + 1,):
        raise ValueError(
            f"attention: page_table {list(page_table.shape)}, cu_seqlens_q {list(cu_seqlens_q.shape)} and kv_lens "
            f"{list(kv_lens.shape)} do not fit"
        )
    if not page_table.dtype == cu_seqlens_q.dtype == kv_lens.dtype == torch.int32:
        raise ValueError("attention: page_table, cu_seqlens_q and kv_lens must be int32")
    if plan is not None and (plan.window != window or plan.arrivals.shape != (num_requests, k_cache.shape[1])):
        raise ValueError(
            f"attention: a plan for {list(plan.arrivals.shape)} requests and KV heads and window={plan.window} does "
            f"not fit {[num_requests, k_cache.shape[1]]} and {window=}"
        )
    group = q.shape[1] // k_cache.shape[1]
    if plan is not None and q.device.type == "cuda" and plan.max_queries * group <= MAX_TILE_ROWS:
        return _decode_triton(q, k_cache, v_cache, page_table, cu_seqlens_q, kv_lens, scale, plan)
    forward = _forward_triton if q.device.type == "cuda" else _forward_cpu
    return forward(q, k_cache, v_cache, page_table, cu_seqlens_q, kv_lens, scale, window, with_lse=False)[0]


def attention_packed(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    scale: float,
    window: int | None = None,
) -> torch.Tensor:
    """Causal attention within each sequence of a packed batch; differentiable, and bit for bit what `attention` gives.

    q: [T, H, D]; k, v: [T, HKV, D]; cu_seqlens: [B + 1] int32, from 0 to T. Returns [T, H, D]. Keys and values are laid
    out as pages and go through `attention`'s own kernel. The backward pass is deterministic. Raises ValueError for
    shapes, dtypes, a scale or a window that do not fit.
    """
    _check(q, k.shape[1], k.shape[2], k.dtype, scale, window)
    if k.shape != v.shape or k.shape[0] != q.shape[0] or v.dtype != k.dtype or cu_seqlens.dtype != torch.int32:
        raise ValueError(
            f"attention_packed: q {list(q.shape)} {q.dtype}, k {list(k.shape)} {k.dtype}, v {list(v.shape)} {v.dtype}, "
            f"cu_seqlens {cu_seqlens.dtype} do not fit"
        )
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return _PackedAttention.apply(q, k, v, cu_seqlens, scale, window)
    return packed_forward(q, k, v, cu_seqlens, scale, window, with_lse=False)[0]


def attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    scale: float,
    window: int | None = None,
) -> torch.Tensor:
    """`attention_packed` in plain torch, any floating dtype, differentiable by autograd. O(T^2) memory a sequence."""
    group = q.shape[1] // k.shape[1]
    bounds = cu_seqlens.tolist()
    outputs = []
    for begin, end in itertools.pairwise(bounds):
        keys, values = (x[begin:end].repeat_interleave(group, dim=1) for x in (k, v))
        position = torch.arange(end - begin, dtype=torch.int64, device=q.device)
        distance = position[:, None] - position[None, :]
        visible = (distance >= 0) & (distance < (window or end - begin + 1))
        scores = torch.einsum("ihd,jhd->hij", q[begin:end], keys) * scale
        weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
        outputs.append(torch.einsum("hij,jhd->ihd", weights, values))
    return torch.cat(outputs)


def _check(
    q: torch.Tensor, num_kv_heads: int, head_dim: int, dtype: torch.dtype, scale: float, window: int | None
) -> None:
    if q.ndim != 3 or q.shape[1] % num_kv_heads or q.shape[2] != head_dim or q.dtype != dtype:
        raise ValueError(
            f"attention: q {list(q.shape)} {q.dtype} does not fit {num_kv_heads} KV heads of {head_dim} in {dtype}"
        )
    if not scale > 0 or (window is not None and window < 1):
        raise ValueError(f"attention: scale and window must be positive, got {scale=} {window=}")


def packed_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    scale: float,
    window: int | None,
    with_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(`attention_packed`'s output, its log-sum-exp fp32 [H, T] if asked for), without autograd."""
    # Sequence b owns the pages from cu_seqlens[b] // page_size + b on: enough for it, known without reading lengths.
    (num_tokens, num_kv_heads, head_dim), device = k.shape, k.device
    page_size = PACKED_PAGE_SIZE[device.type]
    num_requests = cu_seqlens.shape[0] - 1
    num_pages = num_tokens // page_size + num_requests
    starts = cu_seqlens[:-1].long()
    lengths = cu_seqlens.diff()
    first_page = starts // page_size + torch.arange(num_requests, dtype=torch.int64, device=device)
    shift = (first_page * page_size - starts).repeat_interleave(lengths.long(), output_size=num_tokens)
    k_cache, v_cache = new_kv_cache(num_pages, page_size, num_kv_heads, head_dim, k.dtype, device)
    kv_store(k, v, k_cache, v_cache, shift + torch.arange(num_tokens, dtype=torch.int64, device=device))
    max_pages = -(-num_tokens // page_size)
    page_table = (first_page[:, None] + torch.arange(max_pages, dtype=torch.int64, device=device)).to(torch.int32)
    forward = _forward_triton if device.type == "cuda" else _forward_cpu
    return forward(q, k_cache, v_cache, page_table, cu_seqlens, lengths, scale, window, with_lse)


def packed_backward(
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
    """(dq, dk, dv) from what `packed_forward` gave, or from an output and log-sum-exp over more keys than these."""
    if attention_flash_backward.takes(q):
        backward = attention_flash_backward.attention_backward
    else:
        backward = _backward_triton if q.device.type == "cuda" else _backward_cpu
    return backward(grad_out, q, k, v, out, lse, cu_seqlens, scale, window)


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, cu_seqlens, scale, window):
        out, lse = packed_forward(q, k, v, cu_seqlens, scale, window, with_lse=True)
        ctx.save_for_backward(q, k, v, out, lse, cu_seqlens)
        ctx.scale, ctx.window = scale, window
        return out

    @staticmethod
    def backward(ctx, grad_out):
        return *packed_backward(grad_out, *ctx.saved_tensors, ctx.scale, ctx.window), None, None, None
