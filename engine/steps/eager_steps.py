"""Steps of any rows, launched one kernel at a time, on every rank of an engine."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from lockstep.engine.models.attention_plans import fits_a_plan
from lockstep.engine.models.layers.context import AttentionContext, AttentionPart
from lockstep.engine.steps.attention_parts import AttentionParts
from lockstep.engine.steps.layout import StepLayout, rank_step
from lockstep.engine.steps.rank_step import RankStep
from lockstep.engine.steps.target import Computed, Target, TargetRows
from lockstep.engine.steps.transfer import to_device


class EagerSteps:
    """announce: tells the other ranks of a step, before this one takes part in it."""

    def __init__(self, target: Target, parts: AttentionParts, announce: Callable[[RankStep], None]):
        self._target = target
        self._parts = parts
        self._announce = announce

    def run(self, layout: StepLayout) -> Computed:
        step = rank_step(layout)
        self._announce(step)
        return self.compute(step)

    def compute(self, step: RankStep) -> Computed:
        """This rank's part of the step. All ranks make the same calls of the model, in the same order."""
        target, sampled = self._target, step.sampled
        reads_last_layer = target.model.config.num_layers in target.aux_layers
        wants_all = step.scored.size > 0 or target.wants_all_rows or reads_last_layer
        hidden, slots, aux, rows = self._forward(step, None if wants_all else sampled)
        sampled_hidden = hidden
        if wants_all and len(sampled):
            sampled_rows = self._send(sampled)
            sampled_hidden, slots = hidden[sampled_rows], slots[sampled_rows]
        logits = target.model.logits(sampled_hidden) if len(sampled) else None
        return Computed(logits, step.rows[:, sampled], slots, hidden, aux, step.scored, rows)

    def _forward(
        self, step: RankStep, wanted: np.ndarray | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, TargetRows]:
        """(hidden [R, H], slots [R], aux [T, A * H], the T rows). wanted: int64 [R], some of the rows; None: all."""
        num_rows = step.num_rows
        prefill_slots, lengths, kv_lens = step.prefills
        sent = self._send(np.concatenate((step.rows.ravel(), prefill_slots, kv_lens, [0], np.cumsum(lengths))))
        tokens, slots, positions = sent[: 3 * num_rows].view(3, num_rows)
        parts = self._attention(step, slots, positions, sent[3 * num_rows :])
        token_ids, kv_slots = self._target.inputs(tokens, slots, positions)
        last_context, last_slots = None, slots
        if wanted is not None and len(wanted) < num_rows:
            wanted_rows = self._send(wanted)
            last_slots = slots[wanted_rows]
            planned = sent.is_cuda and len(wanted) > 0 and fits_a_plan(step.rows[2, wanted] + 1)
            part = self._parts.decodes(last_slots, positions[wanted_rows], planned)
            last_context = AttentionContext(self._target.kv_caches, kv_slots, (part,), wanted_rows)
        hidden, aux = self._target.forward(token_ids, positions, kv_slots, parts, last_context)
        return hidden, last_slots, aux, TargetRows(token_ids, slots, positions, kv_slots, parts, step.sampled)

    def _attention(
        self, step: RankStep, slots: torch.Tensor, positions: torch.Tensor, prefills: torch.Tensor
    ) -> tuple[AttentionPart, ...]:
        """prefills: int64 [3 P + 1] on the device: slots, tokens in the cache, and where the rows of each begin."""
        num_decodes, num_prefills = step.num_decodes, step.prefills.shape[1]
        parts = []
        if num_decodes:
            planned = fits_a_plan(step.rows[2, :num_decodes] + 1)
            parts.append(self._parts.decodes(slots[:num_decodes], positions[:num_decodes], planned))
        if num_prefills:
            int32s = prefills[num_prefills:].to(torch.int32)
            kv_lens, cu_seqlens_q = int32s[:num_prefills], int32s[num_prefills:]
            num_rows, longest = step.num_rows - num_decodes, int(step.prefills[2].max())
            parts.append(self._parts.prefills(num_rows, prefills[:num_prefills], cu_seqlens_q, kv_lens, longest))
        return tuple(parts)

    def _send(self, values: np.ndarray) -> torch.Tensor:
        return to_device(values, self._target.device)
