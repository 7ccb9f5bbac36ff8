"""Backward of packed attention on the GPU in half precision: the FlashAttention kernels that torch brings along.

They take the output and the log-sum-exp of any forward pass, and are deterministic when torch is told to be.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_DTYPES = (torch.bfloat16, torch.float16)
_MAX_HEAD_DIM = 256


def takes(q: torch.Tensor) -> bool:
    """Whether these kernels can do the backward pass of queries like q, [T, H, D]."""
    return q.device.type == "cuda" and q.dtype in _DTYPES and q.shape[2] % 8 == 0 and q.shape[2] <= _MAX_HEAD_DIM


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
    """Gradients (dq, dk, dv) of `attention_packed`; lse: [H, T] fp32, the other shapes as there. The same each time."""
    num_tokens = q.shape[0]
    if num_tokens == 0:
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    # The longest sequence is on the GPU and reading it would wait; all tokens bound it, and only launch idle programs.
    longest = num_tokens
    unused_rng_state = torch.empty(2, dtype=torch.uint64, device=q.device)
    with deterministic_algorithms():
        return torch.ops.aten._flash_attention_backward(
            grad_out.contiguous(),
            q.contiguous(),
            k.contiguous(),
            v.contiguous(),
            out,
            lse,
            cu_seqlens,
            cu_seqlens,
            longest,
            longest,
            0.0,  # dropout
            True,  # causal
            unused_rng_state,
            torch.empty(0, dtype=torch.float32, device=q.device),
            scale=scale,
            window_size_left=-1 if window is None else window - 1,
            window_size_right=0,
        )


@contextmanager
def deterministic_algorithms() -> Iterator[None]:
    """torch.use_deterministic_algorithms(True), without its filling of new memory; afterwards all is as before."""
    was_on, warned_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = filled
        torch.use_deterministic_algorithms(was_on, warn_only=warned_only)
