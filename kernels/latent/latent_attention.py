"""Causal attention over a paged latent cache: every head reads the one row of a token, as its key and its value.

The row contract is that of `kernels.attention.attention`: the bits of an output row depend on that query row, the
cached rows at positions up to its own, and `scale`; prefill, chunked prefill, decode and the trainer are one op.
"""

import torch

from lockstep.kernels.attention.attention import PACKED_PAGE_SIZE, attention_reference
from lockstep.kernels.attention.attention_cpu import latent_attention_forward as _forward_cpu
from lockstep.kernels.latent.latent_attention_backward import latent_attention_backward
from lockstep.kernels.latent.latent_attention_triton import latent_attention_forward as _forward_triton
from lockstep.kernels.memory.latent_cache import latent_store, new_latent_cache


def latent_attention(
    q: torch.Tensor,
    cache: torch.Tensor,
    value_dim: int,
    page_table: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    kv_lens: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Attend with the last tokens of each request to all of its cached tokens so far (their own included).

        for b in range(B):
            for t in range(cu_seqlens_q[b], cu_seqlens_q[b + 1]):
                i = kv_lens[b] - cu_seqlens_q[b + 1] + t                     # the position of the query
                page, offset = page_table[b, j // page_size], j % page_size  # for j <= i
                rows = cache[page, 0, offset]
                out[t, h] = softmax(scale * q[t, h] @ rows.T) @ rows[:, :value_dim]

    q: [T, H, W]; cache: [P, 1, PS, W] from `new_latent_cache`; the rest as in `lockstep.kernels.attention.attention`,
    also the limit about NaN on a GPU. Returns [T, H, value_dim]. No autograd. Raises ValueError for shapes, dtypes or a
    scale that do not fit.
    """
    _check(q, cache.shape[3], cache.dtype, value_dim, scale)
    num_requests = kv_lens.shape[0]
    if page_table.ndim != 2 or page_table.shape[0] != num_requests or cu_seqlens_q.shape != (num_requests + 1,):
        raise ValueError(
            f"latent_attention: page_table {list(page_table.shape)}, cu_seqlens_q {list(cu_seqlens_q.shape)} and "
            f"kv_lens {list(kv_lens.shape)} do not fit"
        )
    if not page_table.dtype == cu_seqlens_q.dtype == kv_lens.dtype == torch.int32:
        raise ValueError("latent_attention: page_table, cu_seqlens_q and kv_lens must be int32")
    forward = _forward_triton if q.is_cuda else _forward_cpu
    return forward(q, cache, value_dim, page_table, cu_seqlens_q, kv_lens, scale, with_lse=False)[0]


def latent_attention_packed(
    q: torch.Tensor, rows: torch.Tensor, value_dim: int, cu_seqlens: torch.Tensor, scale: float
) -> torch.Tensor:
    """Causal attention within each sequence of a packed batch; differentiable, and bit for bit what
    `latent_attention` gives.

    q: [T, H, W]; rows: [T, W]; cu_seqlens: [B + 1] int32, from 0 to T. Returns [T, H, value_dim]. The rows are laid out
    as pages and go through `latent_attention`'s own kernel. The backward pass is deterministic. Raises ValueError for
    shapes, dtypes or a scale that do not fit.
    """
    _check(q, rows.shape[1], rows.dtype, value_dim, scale)
    if rows.ndim != 2 or rows.shape[0] != q.shape[0] or cu_seqlens.dtype != torch.int32:
        raise ValueError(
            f"latent_attention_packed: q {list(q.shape)}, rows {list(rows.shape)}, cu_seqlens {cu_seqlens.dtype} do "
            "not fit"
        )
    if torch.is_grad_enabled() and (q.requires_grad or rows.requires_grad):
        return _PackedLatentAttention.apply(q, rows, value_dim, cu_seqlens, scale)
    return _packed_forward(q, rows, value_dim, cu_seqlens, scale, with_lse=False)[0]


def latent_attention_reference(
    q: torch.Tensor, rows: torch.Tensor, value_dim: int, cu_seqlens: torch.Tensor, scale: float
) -> torch.Tensor:
    """`latent_attention_packed` in plain torch, any floating dtype, differentiable by autograd."""
    keys = rows[:, None]
    return attention_reference(q, keys, keys, cu_seqlens, scale)[..., :value_dim]


def _check(q: torch.Tensor, width: int, dtype: torch.dtype, value_dim: int, scale: float) -> None:
    if q.ndim != 3 or q.shape[2] != width or q.dtype != dtype or not 1 <= value_dim <= width:
        raise ValueError(
            f"latent_attention: q {list(q.shape)} {q.dtype} and {value_dim=} do not fit rows of {width} in {dtype}"
        )
    if not scale > 0:
        raise ValueError(f"latent_attention: scale must be positive, got {scale}")


def _packed_forward(
    q: torch.Tensor, rows: torch.Tensor, value_dim: int, cu_seqlens: torch.Tensor, scale: float, with_lse: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    # Sequence b owns the pages from cu_seqlens[b] // page_size + b on: enough for it, known without reading lengths.
    (num_tokens, width), device = rows.shape, rows.device
    page_size = PACKED_PAGE_SIZE[device.type]
    num_requests = cu_seqlens.shape[0] - 1
    starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff()
    first_page = starts // page_size + torch.arange(num_requests, dtype=torch.int64, device=device)
    shift = (first_page * page_size - starts).repeat_interleave(lengths.long(), output_size=num_tokens)
    cache = new_latent_cache(num_tokens // page_size + num_requests, page_size, width, rows.dtype, device)
    latent_store(rows, cache, shift + torch.arange(num_tokens, dtype=torch.int64, device=device))
    max_pages = -(-num_tokens // page_size)
    page_table = (first_page[:, None] + torch.arange(max_pages, dtype=torch.int64, device=device)).to(torch.int32)
    forward = _forward_triton if device.type == "cuda" else _forward_cpu
    return forward(q, cache, value_dim, page_table, cu_seqlens, lengths, scale, with_lse)


class _PackedLatentAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, rows, value_dim, cu_seqlens, scale):
        out, lse = _packed_forward(q, rows, value_dim, cu_seqlens, scale, with_lse=True)
        ctx.save_for_backward(q, rows, cu_seqlens, out, lse)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx, grad_out):
        q, rows, cu_seqlens, out, lse = ctx.saved_tensors
        dq, drows = latent_attention_backward(grad_out, q, rows, out, lse, cu_seqlens, ctx.scale)
        return dq, drows, None, None, None
