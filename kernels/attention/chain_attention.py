"""Attention of a row's chain: to the sequence before the row, and to the row's own later steps. For draft training."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lockstep.kernels.attention.attention import attention_packed, packed_backward, packed_forward


def chain_attention(
    q: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], cu_seqlens: Tensor, scale: float
) -> Tensor:
    """Step i = len(keys) - 1 of the chains that begin at every row of packed sequences.

        for t in rows:
            seen = [(0, u) for u in the rows of t's sequence up to t] + [(j, t) for j in 1..i]
            g = h // (H // HKV)
            weights = softmax([scale * q[t, h] @ keys[j][u, g] for j, u in seen])
            out[t, h] = sum(weight * values[j][u, g] for weight, (j, u) in zip(weights, seen))

    q: [T, H, D]; each of keys and values: [T, HKV, D], rotated already, by step; cu_seqlens: [B + 1] int32. Returns
    [T, H, D]. Differentiable and deterministic; for one step it is `attention_packed`. Memory grows with the steps, not
    with their squares: keys and values are not copied.

    The first part is one packed attention, whose output and log-sum-exp are merged with the few scores of the second.
    Backwards, its own kernel is given the merged ones: its weights are then those of the merged softmax.
    """
    if len(keys) != len(values) or not keys:
        raise ValueError(f"chain_attention: {len(keys)} steps' keys and {len(values)} steps' values")
    if len(keys) == 1:
        return attention_packed(q, keys[0], values[0], cu_seqlens, scale)
    return _ChainAttention.apply(q, cu_seqlens, scale, *keys, *values)


def chain_attention_reference(
    q: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], cu_seqlens: Tensor, scale: float
) -> Tensor:
    """`chain_attention` in plain torch with a dense mask, differentiable by autograd, in any dtype. O(T^2) memory."""
    group = q.shape[1] // keys[0].shape[1]
    rows = torch.arange(len(q), dtype=torch.int64, device=q.device)
    sequence = torch.bucketize(rows, cu_seqlens[1:].long(), right=True)
    first = (sequence[:, None] == sequence[None]) & (rows[:, None] >= rows[None])
    mask = torch.cat([first, *[torch.eye(len(q), dtype=torch.bool, device=q.device)] * (len(keys) - 1)], dim=1)
    k, v = (torch.cat(list(x)).repeat_interleave(group, dim=1) for x in (keys, values))
    scores = torch.einsum("ihd,jhd->hij", q, k) * scale
    return torch.einsum("hij,jhd->ihd", scores.masked_fill(~mask, float("-inf")).softmax(-1), v)


class _ChainAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, cu_seqlens, scale, *keys_and_values):
        steps = len(keys_and_values) // 2
        keys, values = keys_and_values[:steps], keys_and_values[steps:]
        before, lse = packed_forward(q, keys[0], values[0], cu_seqlens, scale, None, with_lse=True)
        # [T, HKV, group, steps]: a column for what came before, then one for each later step.
        q_grouped = q.view(len(q), keys[0].shape[1], -1, q.shape[2]).float()
        own = [scale * (q_grouped * key.unsqueeze(2)).sum(-1) for key in keys[1:]]
        scores = torch.stack([lse.T.reshape(own[0].shape), *own], dim=-1)
        merged_lse = scores.logsumexp(-1)
        weights = (scores - merged_lse.unsqueeze(-1)).exp().unsqueeze(-2)
        out = before.view(q_grouped.shape) * weights[..., 0]
        for step, value in enumerate(values[1:], start=1):
            out = torch.addcmul(out, weights[..., step], value.unsqueeze(2).float())
        out = out.view(q.shape).to(q.dtype)
        ctx.save_for_backward(q, cu_seqlens, out, merged_lse.flatten(1).T.contiguous(), *keys_and_values)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        q, cu_seqlens, out, lse, *keys_and_values = ctx.saved_tensors
        steps = len(keys_and_values) // 2
        keys, values = keys_and_values[:steps], keys_and_values[steps:]
        grad_out = grad_out.contiguous()
        dq, dk, dv = packed_backward(grad_out, q, keys[0], values[0], out, lse, cu_seqlens, ctx.scale, None)
        by_group = (len(q), keys[0].shape[1], -1, q.shape[2])
        q_grouped, grad_grouped = q.view(by_group).float(), grad_out.view(by_group).float()
        delta = (grad_grouped * out.view(by_group)).sum(-1)
        lse = lse.T.reshape(delta.shape)
        dq = dq.float().view(by_group)
        key_grads, value_grads = [dk], [dv]
        for key, value in zip(keys[1:], values[1:], strict=True):
            key, value = key.unsqueeze(2).float(), value.unsqueeze(2).float()
            weight = (ctx.scale * (q_grouped * key).sum(-1) - lse).exp()
            score_grad = ctx.scale * weight * ((grad_grouped * value).sum(-1) - delta)
            dq = torch.addcmul(dq, score_grad.unsqueeze(-1), key)
            key_grads.append((score_grad.unsqueeze(-1) * q_grouped).sum(2).to(q.dtype))
            value_grads.append((weight.unsqueeze(-1) * grad_grouped).sum(2).to(q.dtype))
        return dq.view(q.shape).to(q.dtype), None, None, *key_grads, *value_grads
