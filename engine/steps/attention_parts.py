"""Who attends to what in a step: page tables, lengths and plans, as the layers' attention takes them."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from lockstep.engine.models.attention_plans import plan_few_rows
from lockstep.engine.models.layers.context import AttentionPart, PlanKey
from lockstep.engine.steps.packed_rows import PackedRows, PackedSize
from lockstep.engine.steps.page_table import PageTable
from lockstep.kernels.attention.attention_plan import AttentionPlan, Groups


class AttentionParts:
    """plan_keys: of the plans that the model's layers take; none where these go without."""

    def __init__(self, page_table: PageTable, plan_keys: Iterable[PlanKey] = ()):
        self._page_table = page_table
        self._plan_keys = set(plan_keys)

    def decodes(self, slots: torch.Tensor, positions: torch.Tensor, planned: bool = True) -> AttentionPart:
        """One row for each request. slots (-1: padding) and positions: int64 [B], on the device."""
        kv_lens = torch.where(slots >= 0, positions + 1, 0).to(torch.int32)
        cu_seqlens_q = torch.arange(len(slots) + 1, dtype=torch.int32, device=slots.device)
        plans = self._plans(kv_lens, cu_seqlens_q, 1) if planned else {}
        return AttentionPart(
            len(slots), self._page_table.of(slots), cu_seqlens_q, kv_lens, plans, 1 if planned else None
        )

    def packed(self, step: PackedRows, size: PackedSize) -> AttentionPart:
        """The rows of a graph."""
        plans = self._plans(step.kv_lens, step.cu_seqlens_q, size.rows_per_request, step.groups)
        pages = self._page_table.of(step.slots)
        return AttentionPart(size.rows, pages, step.cu_seqlens_q, step.kv_lens, plans, size.rows_per_request)

    def prefills(
        self, num_rows: int, slots: torch.Tensor, cu_seqlens_q: torch.Tensor, kv_lens: torch.Tensor, longest: int
    ) -> AttentionPart:
        """Any number of rows for each request. longest: the largest of kv_lens."""
        table = self._page_table
        num_pages = -(-longest // table.page_size)
        return AttentionPart(num_rows, table.on_device[:, :num_pages].index_select(0, slots), cu_seqlens_q, kv_lens)

    def _plans(
        self, kv_lens: torch.Tensor, cu_seqlens_q: torch.Tensor, rows_per_request: int, groups: Groups | None = None
    ) -> dict[PlanKey, AttentionPlan]:
        return {
            key: plan_few_rows(kv_lens, cu_seqlens_q, key.num_kv_heads, rows_per_request, key.window, groups)
            for key in self._plan_keys
        }
