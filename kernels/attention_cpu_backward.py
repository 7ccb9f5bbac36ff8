"""The gradients of packed attention on the CPU, in blocked plain torch."""

from collections.abc import Iterator

import torch

QUERY_BLOCK = 64
BLOCK_SCORES = 1 << 19  # scores in a batch of blocks, so that they stay in the cache
LENGTH_STEP = 16  # sequences are padded to a multiple of this


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
