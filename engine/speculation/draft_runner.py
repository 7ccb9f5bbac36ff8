"""Lets an EAGLE-3 drafter follow the runner's steps: as the target's rows come, on the device, without waiting."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from lockstep.engine.models.layers.context import AttentionPart
from lockstep.engine.scheduling.scheduler import Chunk
from lockstep.engine.speculation.eagle import DrawnRows, EagleDrafter
from lockstep.engine.speculation.step_graphs import StepGraphs
from lockstep.engine.speculation.step_rows import StepRows, StepSize, pack, unpack
from lockstep.engine.steps.transfer import to_device
from lockstep.kernels.memory.step_inputs import step_inputs


class TargetStep(NamedTuple):
    """What the target computed in a step of T rows: aux [T, 3H], and where. tokens, slots, positions: int64 [T]."""

    aux: torch.Tensor
    tokens: torch.Tensor
    slots: torch.Tensor
    positions: torch.Tensor
    kv_slots: torch.Tensor
    parts: tuple[AttentionPart, ...]


class _GraphKey(NamedTuple):
    size: StepSize
    chains: bool


class DraftRunner:
    """page_table, last_tokens: the runner's, on the device. Returned drafts are int64 [B, k] there, by request."""

    def __init__(self, drafter: EagleDrafter, page_table: torch.Tensor, last_tokens: torch.Tensor):
        self.drafter = drafter
        self.page_table = page_table
        self.last_tokens = last_tokens
        self.device = page_table.device
        self.graphs: StepGraphs | None = None

    def forget_graphs(self) -> None:
        """The tensors that graphs read were replaced."""
        self.graphs = StepGraphs(self._follow_rows)

    def follow(
        self,
        step: TargetStep,
        chunks: Sequence[Chunk],
        drawing_rows: np.ndarray,
        draws: torch.Tensor,
        chains: bool,
    ) -> torch.Tensor | None:
        """After a step of any chunks, which lie end to end. draws: of the drawing_rows. None unless it chains."""
        next_tokens = to_device(_known_next_tokens(chunks), self.device)
        if len(drawing_rows) == 0:
            self._follow(step, next_tokens)
            return None
        is_drawn = to_device(drawing_rows, self.device)
        draws = draws.clamp(min=0)  # -1: no number to draw from
        normed, feedback = self._follow(step, next_tokens.index_copy_(0, is_drawn, draws))
        if not chains:
            return None
        drawing = [chunk for chunk in chunks if chunk.samples]
        lengths = [1 + len(chunk.drafts) for chunk in drawing]
        size = StepSize(len(drawing), max(lengths))
        no_rows = np.zeros((3, sum(lengths)), np.int64)  # those of the target are on the device already
        page_size = self.drafter.page_size
        sent = to_device(pack(no_rows, [chunk.request for chunk in drawing], lengths, page_size, size), self.device)
        drawn = _drawn_rows(unpack(sent, size), step.tokens[is_drawn], step.positions[is_drawn], draws)
        return self.drafter.chain(normed[is_drawn], feedback[is_drawn], drawn, self.page_table, self._decode_part)

    def follow_graph(
        self, packed: torch.Tensor, size: StepSize, aux: torch.Tensor, draws: torch.Tensor, chains: bool
    ) -> torch.Tensor | None:
        """After a step that is all drawn rows, as a graph. packed: the step's, by `step_rows.pack`."""
        key = _GraphKey(size, chains)

        def blank() -> tuple[torch.Tensor, ...]:
            nothing = pack(np.zeros((3, 0), np.int64), [], [], self.drafter.page_size, size).to(self.device)
            return nothing, aux.new_zeros(size.rows, aux.shape[1]), draws.new_zeros(size.rows)

        return self.graphs.run(key, (packed, aux, draws), blank)

    def _follow_rows(
        self, key: _GraphKey, packed: torch.Tensor, aux: torch.Tensor, draws: torch.Tensor
    ) -> torch.Tensor | None:
        rows = unpack(packed, key.size)
        tokens, slots, positions = rows.rows
        _, kv_slots = step_inputs(tokens, slots, positions, self.last_tokens, self.page_table, self.drafter.page_size)
        part = AttentionPart(
            key.size.rows,
            self.page_table.index_select(0, rows.slots.clamp(min=0)),
            rows.cu_seqlens_q,
            rows.kv_lens,
            max_queries=key.size.rows_per_request,
        )
        draws = draws.clamp(min=0)
        step = TargetStep(aux, tokens, slots, positions, kv_slots, (part,))
        normed, feedback = self._follow(step, draws)
        if not key.chains:
            return None
        drawn = _drawn_rows(rows, tokens, positions, draws)
        return self.drafter.chain(normed, feedback, drawn, self.page_table, self._decode_part)

    def _follow(self, step: TargetStep, next_tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.drafter.follow(step.aux, next_tokens, step.positions, step.kv_slots, step.parts)

    def _decode_part(self, slots: torch.Tensor, positions: torch.Tensor) -> AttentionPart:
        kv_lens = torch.where(slots >= 0, positions + 1, 0).to(torch.int32)
        cu_seqlens_q = torch.arange(len(slots) + 1, dtype=torch.int32, device=self.device)
        pages = self.page_table.index_select(0, slots.clamp(min=0))
        return AttentionPart(len(slots), pages, cu_seqlens_q, kv_lens, max_queries=1)


def _drawn_rows(rows: StepRows, tokens: torch.Tensor, positions: torch.Tensor, draws: torch.Tensor) -> DrawnRows:
    starts, ends = rows.cu_seqlens_q[:-1].long(), rows.cu_seqlens_q[1:].long()
    return DrawnRows(
        tokens=tokens,
        positions=positions,
        draws=draws,
        first=starts.clamp(max=len(tokens) - 1),
        num_drafts=ends - starts - 1,
        slots=rows.slots,
        limits=rows.limits,
        seeds=rows.seeds,
        temperatures=rows.temperatures,
    )


def _known_next_tokens(chunks: Sequence[Chunk]) -> np.ndarray:
    """int64 [T], the token after each row; 0 where it is not known (yet)."""
    tokens = np.zeros(sum([chunk.length for chunk in chunks]), np.int64)
    first = 0
    for chunk in chunks:
        known = chunk.request.tokens[chunk.start + 1 : chunk.start + 1 + chunk.length]
        tokens[first : first + len(known)] = known
        first += chunk.length
    return tokens
