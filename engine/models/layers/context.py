"""What a step's rows attend to: requests, pages, and where new keys and values go."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from lockstep.engine.memory.layer_caches import LayerCache
from lockstep.kernels.attention.attention_plan import AttentionPlan


class PlanKey(NamedTuple):
    """What an AttentionPlan depends on beside the step's requests."""

    num_kv_heads: int
    queries_per_kv_head: int
    window: int | None


@dataclass(frozen=True)
class AttentionPart:
    """Requests whose queries are `num_rows` consecutive rows of a step. B requests, MP pages at most per request.

    page_table:   int32 [B, MP], the pages of each request in order.
    cu_seqlens_q: int32 [B + 1], the rows of request b are cu_seqlens_q[b] to cu_seqlens_q[b + 1] of the part's.
    kv_lens:      int32 [B], tokens of request b in the cache once this step's are stored.
    plans:        how kernels cut the work of few rows on a GPU; missing: not planned.
    max_queries:  the most rows of a request, where they are few; None: any number.
    """

    num_rows: int
    page_table: torch.Tensor
    cu_seqlens_q: torch.Tensor
    kv_lens: torch.Tensor
    plans: dict[PlanKey, AttentionPlan] = field(default_factory=dict)
    max_queries: int | None = None


@dataclass(frozen=True)
class AttentionContext:
    """Where a step's T rows find and leave their keys and values.

    kv_caches: one per layer, from `new_layer_caches`.
    slots:     int64 [T], where each row's key and value go; -1 for padding rows.
    parts:     the requests of the rows that attend; the parts' rows follow one another and are all of them.
    rows:      int64 [R], the rows that attend and go on; the others end with their key and value. None: all.
    """

    kv_caches: list[LayerCache]
    slots: torch.Tensor
    parts: tuple[AttentionPart, ...]
    rows: torch.Tensor | None = None


def attend_by_part(
    q: torch.Tensor, parts: tuple[AttentionPart, ...], attend: Callable[[torch.Tensor, AttentionPart], torch.Tensor]
) -> torch.Tensor:
    """`attend` on the rows q[R, ...] of each part, laid end to end again."""
    if len(parts) == 1:
        return attend(q, parts[0])
    return torch.cat(
        [attend(rows, part) for rows, part in zip(q.split([p.num_rows for p in parts]), parts, strict=True)]
    )
