"""Drafts by an EAGLE-3 model: it computes the rows of each step of the target, and goes on by its own tokens.

Row t of the target's text is a row of the draft's too, with the target's states at t and the token at t + 1. The draft
computes these rows in each step of the target, whatever that does, so its keys and values lie in the same pages at the
same positions: prefix hits, preemption and updates of the weights need nothing more. (The last row of a page was
computed before a token which another text that shares the page may not share. That costs that text a little of its
draft's accuracy, and no more.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

from lockstep.engine.intake import checked_version
from lockstep.engine.models.attention_plans import plan_few_rows
from lockstep.engine.models.eagle3 import Eagle3Draft
from lockstep.engine.models.layers.context import AttentionPart
from lockstep.engine.request import Request
from lockstep.engine.weights.served_weights import copy_in_place
from lockstep.engine.weights.staging import NamedTensors, stage
from lockstep.kernels.attention.attention import attention
from lockstep.kernels.attention.attention_plan import AttentionPlan
from lockstep.kernels.memory.kv_cache import new_kv_cache
from lockstep.kernels.norm_rope.qk_norm_rope_store import qk_norm_rope_store
from lockstep.kernels.sampling.noise import gumbel_noise

# Requests (slots [B]) and their newest positions [B] -> the part of a step that has one row for each.
DecodePart = Callable[[torch.Tensor, torch.Tensor], AttentionPart]


class NextDrafts(NamedTuple):
    """Draft tokens for what follows a request's first num_tokens tokens."""

    num_tokens: int
    drafts: list[int]


@dataclass(frozen=True)
class SampledRows:
    """The R rows of a step that were sampled from, of B requests. On the device, int64 but for the temperatures.

    tokens, positions, sampled: [R], what the rows computed, where, and what was sampled after them.
    first:        [B], the first row of each request; the others follow it.
    num_drafts:   [B], how many do.
    slots:        [B], the requests' rows in the page table; -1 for padding.
    limits:       [B], the tokens that the requests have pages for.
    seeds, temperatures: [B], of the requests' samples; fp32 the latter.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    sampled: torch.Tensor
    first: torch.Tensor
    num_drafts: torch.Tensor
    slots: torch.Tensor
    limits: torch.Tensor
    seeds: torch.Tensor
    temperatures: torch.Tensor


class EagleDrafter:
    """Owns the draft model and its KV cache. DraftSteps runs it after each step of the target."""

    def __init__(self, draft: Eagle3Draft, num_tokens: int, num_pages: int, page_size: int, max_model_len: int):
        self.draft = draft
        self.num_tokens = num_tokens
        self.page_size = page_size
        self.max_position = max_model_len - 1
        weight = draft.fc.weight
        config = draft.config
        self._cache_shape = (num_pages, page_size, config.num_kv_heads, config.head_dim, weight.dtype, weight.device)
        self.version = 0
        self.kv_cache: tuple[torch.Tensor, ...] = ()  # until the runner takes memory for both caches

    # What the engine asks ----------------------------------------------------------------------------------------

    def propose(self, request: Request, num_tokens: int) -> list[int]:
        """The draft tokens that the last step left, if they go on from the request's newest token."""
        left, request.drafter_state = request.drafter_state, None
        if left is None or left.num_tokens != len(request.tokens):
            return []
        return left.drafts[:num_tokens]

    def finished(self, request: Request) -> None:
        """Nothing is learned from it."""

    def next_version(self, version: int) -> int:
        """Raises ValueError that says that the version is old."""
        return checked_version(version, self.version, "draft version")

    def stage(self, named_tensors: NamedTensors) -> dict[str, torch.Tensor]:
        """Reads an update to its end. Raises ValueError that names the tensor which does not fit."""
        return stage(named_tensors, self.update_targets()).parts

    def update_targets(self) -> dict[str, torch.Tensor]:
        """What an update of the draft replaces."""
        return {**dict(self.draft.named_parameters()), "token_map": self.draft.token_map}

    def update(self, tensors: Mapping[str, torch.Tensor], version: int) -> None:
        """Writes staged tensors in place. Raises ValueError for a vocabulary that is none, before anything else."""
        self.draft.set_vocabulary(tensors["token_map"])
        copy_in_place(tensors, self.update_targets())
        self.version = version

    def share_embedding(self, weight: torch.Tensor) -> None:
        """Reads the target's embedding where it is from now on."""
        self.draft.share_embedding(weight)

    def stats(self) -> dict[str, int]:
        return {"draft_version": self.version}

    def take_kv_cache(self) -> None:
        self.kv_cache = new_kv_cache(*self._cache_shape)

    def free_kv_cache(self) -> None:
        self.kv_cache = ()

    # What follows a step of the target -----------------------------------------------------------------------------

    def compute(
        self,
        aux: torch.Tensor,
        next_tokens: torch.Tensor,
        positions: torch.Tensor,
        kv_slots: torch.Tensor,
        parts: tuple[AttentionPart, ...],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The draft's rows of a step: (normed, feedback) [T, H] of `Eagle3Draft.layer`.

        aux [T, 3H]; next_tokens int64 [T], the token after each row; the rest as in the target's step.
        """
        attend = self._attend(positions, kv_slots, parts)
        return self.draft.layer(self.draft.combine(aux), next_tokens, attend)

    def draft_next(
        self,
        normed: torch.Tensor,
        feedback: torch.Tensor,
        rows: SampledRows,
        page_table: torch.Tensor,
        decode_part: DecodePart,
    ) -> torch.Tensor:
        """Drafts [B, num_tokens] for the positions after each request's newest token. normed, feedback: [R, H]."""
        last = rows.first + self._num_accepted(rows)
        normed, feedback, position = normed[last], feedback[last], rows.positions[last]
        drafts = []
        for step in range(self.num_tokens):
            if step > 0:
                position = position + 1
                at = position.clamp(max=self.max_position)
                part = decode_part(rows.slots, at)
                attend = self._attend(at, self._kv_slots(rows, position, page_table), (part,))
                normed, feedback = self.draft.layer(feedback, drafts[-1], attend)
            drafts.append(self._sample(normed, rows, position + 2))
        return torch.stack(drafts, dim=1)

    def _num_accepted(self, rows: SampledRows) -> torch.Tensor:
        """[B], as `verification.num_valid` counts them on the host, less one."""
        place = torch.arange(self.num_tokens, dtype=torch.int64, device=rows.first.device)
        row = rows.first[:, None] + place
        is_draft = place < rows.num_drafts[:, None]
        drafted = (row + 1).clamp(max=len(rows.tokens) - 1)
        row = row.clamp(max=len(rows.tokens) - 1)
        holds = is_draft & (rows.sampled[row] == rows.tokens[drafted])
        return holds.to(torch.int64).cumprod(1).sum(1)

    def _sample(self, normed: torch.Tensor, rows: SampledRows, positions: torch.Tensor) -> torch.Tensor:
        """The target's rule over the draft's tokens, with the noise of their ids in the target's vocabulary."""
        scores = self.draft.logits(normed).float()
        noise = gumbel_noise(rows.seeds, positions, self.draft.config.vocab_size)[:, self.draft.token_map]
        is_greedy = rows.temperatures == 0
        noisy = scores / torch.where(is_greedy, 1.0, rows.temperatures)[:, None] + noise
        return self.draft.target_ids(torch.where(is_greedy[:, None], scores, noisy).argmax(-1))

    def _kv_slots(self, rows: SampledRows, position: torch.Tensor, page_table: torch.Tensor) -> torch.Tensor:
        """Where the keys of a position go: nowhere (-1) behind the pages that the request has."""
        page = position.clamp(max=self.max_position) // self.page_size
        slots = page_table[rows.slots.clamp(min=0), page].long() * self.page_size + position % self.page_size
        return torch.where((position < rows.limits) & (rows.slots >= 0), slots, -1)

    def _attend(
        self, positions: torch.Tensor, kv_slots: torch.Tensor, parts: tuple[AttentionPart, ...]
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        k_cache, v_cache = self.kv_cache
        config = self.draft.config

        def attend(qkv: torch.Tensor) -> torch.Tensor:
            q = qk_norm_rope_store(
                qkv, None, None, config.rms_norm_eps, self.draft.rope_cos_sin, positions, k_cache, v_cache, kv_slots
            )
            outs = [
                attention(
                    part_q,
                    k_cache,
                    v_cache,
                    part.page_table,
                    part.cu_seqlens_q,
                    part.kv_lens,
                    config.head_dim**-0.5,
                    plan=self._plan(part),
                )
                for part_q, part in zip(q.split([part.num_rows for part in parts]), parts, strict=True)
            ]
            out = outs[0] if len(outs) == 1 else torch.cat(outs)
            return out.view(-1, config.query_size)

        return attend

    def _plan(self, part: AttentionPart) -> AttentionPlan | None:
        """Not the target's, whose KV heads and windows may be others."""
        if part.max_queries is None or part.kv_lens.device.type == "cpu":
            return None
        return plan_few_rows(part.kv_lens, part.cu_seqlens_q, self.draft.config.num_kv_heads, part.max_queries)
