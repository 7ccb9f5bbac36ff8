"""What a draft model does after each step of the target: the same rows, on the device, and drafts for the next step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from lockstep.engine.speculation.eagle import EagleDrafter, SampledRows
from lockstep.engine.steps.attention_parts import AttentionParts
from lockstep.engine.steps.graphs import StepGraphs
from lockstep.engine.steps.layout import StepLayout, next_tokens
from lockstep.engine.steps.packed_rows import PackedRows, PackedSize, RowPacker, unpack
from lockstep.engine.steps.target import Computed, GraphInputs, Target, TargetRows
from lockstep.engine.steps.transfer import to_device


class _DraftKey(NamedTuple):
    size: PackedSize
    drafts_next: bool


class DraftSteps:
    """An EAGLE-3 draft model beside its target. A step that was a graph is one here too."""

    def __init__(self, drafter: EagleDrafter, target: Target, packer: RowPacker):
        self.drafter = drafter
        self._target = target
        self._packer = packer
        self._page_table = target.page_table.on_device
        self._parts = AttentionParts(target.page_table)  # the drafter plans for its own heads
        self._graphs = StepGraphs(self._compute_packed)

    @property
    def aux_layers(self) -> tuple[int, ...]:
        """The target's layers whose incoming hidden states the model reads."""
        return self.drafter.draft.config.aux_layers

    @property
    def kv_caches(self) -> Sequence[torch.Tensor]:
        return self.drafter.kv_cache

    def forget(self) -> None:
        """See StepGraphs."""
        self._graphs.forget()

    def take_kv_cache(self) -> None:
        self.drafter.take_kv_cache()

    def free_kv_cache(self) -> None:
        self.drafter.free_kv_cache()

    def run_after(
        self, layout: StepLayout, computed: Computed, tokens: torch.Tensor, drafts_next: bool
    ) -> torch.Tensor | None:
        """tokens: those sampled in the step. Draft tokens int64 [B, k], by request, if there are to be any next."""
        inputs = computed.inputs
        if isinstance(inputs, GraphInputs):
            drafts = self._graph(inputs, computed.aux, tokens, drafts_next)
            return None if drafts is None else drafts[: len(layout.sampled)]
        return self._eager(layout, inputs, computed, tokens, drafts_next)

    def _graph(
        self, inputs: GraphInputs, aux: torch.Tensor, tokens: torch.Tensor, drafts_next: bool
    ) -> torch.Tensor | None:
        size = inputs.size

        def blank() -> tuple[torch.Tensor, ...]:
            return self._packer.blank(size), aux.new_zeros(size.rows, aux.shape[1]), tokens.new_zeros(size.rows)

        return self._graphs.run(_DraftKey(size, drafts_next), (inputs.packed, aux, tokens), blank)

    def _eager(
        self, layout: StepLayout, rows: TargetRows, computed: Computed, tokens: torch.Tensor, drafts_next: bool
    ) -> torch.Tensor | None:
        following = to_device(next_tokens(layout.chunks), self._target.device)
        if len(rows.sampled) == 0:
            self.drafter.compute(computed.aux, following, rows.positions, rows.kv_slots, rows.parts)
            return None
        is_sampled = to_device(rows.sampled, self._target.device)
        tokens = tokens.clamp(min=0)  # -1: no number to sample from
        following.index_copy_(0, is_sampled, tokens)
        normed, feedback = self.drafter.compute(computed.aux, following, rows.positions, rows.kv_slots, rows.parts)
        if not drafts_next:
            return None
        lengths = [1 + len(drafts) for drafts in layout.drafts]
        size = PackedSize(len(lengths), max(lengths))
        packed = self._packer.pack(computed.rows, layout.sampled, lengths, size)
        by_request = unpack(to_device(packed, self._target.device), size)
        sampled = _sampled_rows(by_request, rows.tokens[is_sampled], rows.positions[is_sampled], tokens)
        return self._draft_next(normed[is_sampled], feedback[is_sampled], sampled)

    def _compute_packed(
        self, key: _DraftKey, packed: torch.Tensor, aux: torch.Tensor, tokens: torch.Tensor
    ) -> torch.Tensor | None:
        step = unpack(packed, key.size)
        computed, slots, positions = step.rows
        _, kv_slots = self._target.inputs(computed, slots, positions)
        part = self._parts.packed(step, key.size)
        tokens = tokens.clamp(min=0)
        normed, feedback = self.drafter.compute(aux, tokens, positions, kv_slots, (part,))
        if not key.drafts_next:
            return None
        return self._draft_next(normed, feedback, _sampled_rows(step, computed, positions, tokens))

    def _draft_next(self, normed: torch.Tensor, feedback: torch.Tensor, rows: SampledRows) -> torch.Tensor:
        return self.drafter.draft_next(normed, feedback, rows, self._page_table, self._parts.decodes)


class NoDraft:
    """An engine without a draft model."""

    aux_layers: tuple[int, ...] = ()
    kv_caches: Sequence[torch.Tensor] = ()

    def forget(self) -> None:
        pass

    def take_kv_cache(self) -> None:
        pass

    def free_kv_cache(self) -> None:
        pass

    def run_after(self, layout: StepLayout, computed: Computed, tokens: torch.Tensor, drafts_next: bool) -> None:
        return None


def _sampled_rows(
    step: PackedRows, tokens: torch.Tensor, positions: torch.Tensor, sampled: torch.Tensor
) -> SampledRows:
    starts, ends = step.cu_seqlens_q[:-1].long(), step.cu_seqlens_q[1:].long()
    return SampledRows(
        tokens=tokens,
        positions=positions,
        sampled=sampled,
        first=starts.clamp(max=len(tokens) - 1),
        num_drafts=ends - starts - 1,
        slots=step.slots,
        limits=step.limits,
        seeds=step.seeds,
        temperatures=step.temperatures,
    )
