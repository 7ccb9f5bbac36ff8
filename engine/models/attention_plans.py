"""Plans of attention for steps with few rows per request, within a bounded workspace."""

from __future__ import annotations

import torch
from numpy.typing import ArrayLike

from lockstep.kernels.attention.attention_plan import AttentionPlan, Groups, num_attention_items, plan_attention

MAX_DECODE_ITEMS = 8192  # of a step with one row per request; larger steps go without a plan
MAX_VERIFY_ITEMS = 2048  # of a step with several, whose items take more workspace each


def max_items(rows_per_request: int) -> int:
    """Items of attention that a planned step has room for."""
    return MAX_DECODE_ITEMS if rows_per_request == 1 else MAX_VERIFY_ITEMS


def fits_a_plan(kv_lens: ArrayLike, rows_per_request: int = 1) -> bool:
    """On the host: whether requests of these lengths, this step's rows included, may be planned."""
    return num_attention_items(kv_lens) <= max_items(rows_per_request)


def plan_few_rows(
    kv_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    num_kv_heads: int,
    rows_per_request: int,
    window: int | None = None,
    groups: Groups | None = None,
) -> AttentionPlan:
    """See `plan_attention`. rows_per_request: the most rows of a request."""
    items = max_items(rows_per_request)
    return plan_attention(kv_lens, cu_seqlens_q, num_kv_heads, items, rows_per_request, window, groups)
