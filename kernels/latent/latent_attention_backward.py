"""The gradients of packed latent attention."""

import torch

from lockstep.kernels.attention.attention_cpu_backward import attention_backward as _backward_cpu
from lockstep.kernels.latent.latent_attention_backward_triton import latent_attention_backward as _backward_triton


def latent_attention_backward(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    rows: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    cu_seqlens: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients (dq, drows) of `latent_attention_packed`; lse: [H, T] fp32. Deterministic.

    A row is a key, and its first columns are a value: it has the gradients of both.
    """
    if q.is_cuda:
        return _backward_triton(grad_out, q, rows, out, lse, cu_seqlens, scale)
    value_dim = out.shape[2]
    keys, values = rows[:, None], rows[:, None, :value_dim]
    dq, dk, dv = _backward_cpu(grad_out, q, keys, values, out, lse, cu_seqlens, scale, None)
    dk[..., :value_dim] += dv
    return dq, dk[:, 0]
