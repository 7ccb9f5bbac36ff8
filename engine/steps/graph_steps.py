"""Steps that are CUDA graphs: those that sample from every row, decodes and verifications of drafts."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from lockstep.engine.models.attention_plans import fits_a_plan
from lockstep.engine.steps.attention_parts import AttentionParts
from lockstep.engine.steps.graphs import StepGraphs, bucket_sizes
from lockstep.engine.steps.layout import StepLayout
from lockstep.engine.steps.packed_rows import PackedSize, RowPacker, unpack
from lockstep.engine.steps.target import Computed, GraphInputs, Target

MAX_VERIFY_GRAPH_REQUESTS = 64  # larger steps that verify drafts are not worth the memory of a graph
_NONE_SCORED = np.empty((2, 0), np.int64)


class _StepKey(NamedTuple):
    size: PackedSize
    grouped: bool


class GraphSteps:
    """rows_per_request: the most of a request, its newest token and its drafts.

    group_requests: how many decodes may read a prefix that they share together; 0: none.
    """

    def __init__(
        self, target: Target, parts: AttentionParts, packer: RowPacker, rows_per_request: int, group_requests: int
    ):
        self._target = target
        self._parts = parts
        self._packer = packer
        self._rows_per_request = rows_per_request
        self._group_requests = group_requests
        self._buckets = bucket_sizes(len(target.page_table.on_host))
        self._decodes = StepGraphs(self._compute)
        self._verifications = StepGraphs(self._compute)

    def forget(self) -> None:
        """See StepGraphs."""
        self._decodes.forget()
        self._verifications.forget()

    def run(self, layout: StepLayout) -> Computed | None:
        """Launches the graph of the next size, whose other rows are padding. None for a step that is none."""
        size = self._size(layout)
        if size is None:
            return None
        if size.rows_per_request == 1:
            graphs, lengths = self._decodes, None
            groups = self._target.page_table.groups(layout.rows, self._group_requests) if self._group_requests else None
        else:
            graphs, lengths = self._verifications, [chunk.length for chunk in layout.chunks]
            groups = None
        packed = self._packer.pack(layout.rows, layout.sampled, lengths, size, groups)
        key = _StepKey(size, groups is not None)
        logits, aux, hidden, slots = graphs.run(key, (packed,), lambda: (self._packer.blank(*key),))
        count = layout.num_rows
        return Computed(
            logits=logits[:count],
            rows=layout.rows,
            slots=slots[:count],
            hidden=hidden[:count],
            aux=aux[:count],
            scored=_NONE_SCORED,
            inputs=GraphInputs(packed[: size.num_packed], size),
        )

    def _size(self, layout: StepLayout) -> PackedSize | None:
        chunks = layout.chunks
        count = len(chunks)
        if len(layout.sampled) != count:
            return None
        if layout.num_decodes == count:
            return PackedSize(self._bucket(count), 1) if fits_a_plan(layout.rows[2] + 1) else None
        if count > MAX_VERIFY_GRAPH_REQUESTS or any(chunk.length != 1 + len(chunk.drafts) for chunk in chunks):
            return None
        kv_lens = [chunk.start + chunk.length for chunk in chunks]
        size = PackedSize(self._bucket(count), self._rows_per_request)
        return size if fits_a_plan(kv_lens, size.rows_per_request) else None

    def _bucket(self, num_requests: int) -> int:
        return next(size for size in self._buckets if size >= num_requests)

    def _compute(self, key: _StepKey, packed: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(logits [R, V], aux [R, A * H], hidden [R, H], slots [R])."""
        step = unpack(packed, key.size)
        tokens, slots, positions = step.rows
        token_ids, kv_slots = self._target.inputs(tokens, slots, positions)
        part = self._parts.packed(step, key.size)
        hidden, aux = self._target.forward(token_ids, positions, kv_slots, (part,))
        return self._target.model.logits(hidden), aux, hidden, slots


class NoGraphSteps:
    """Where steps are not graphs: on a CPU, over several ranks (NCCL's collectives stay outside), for rewards."""

    def forget(self) -> None:
        pass

    def run(self, layout: StepLayout) -> None:
        return None
