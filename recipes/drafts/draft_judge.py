"""What the engine's verification would make of drafts, found out on finished samples, without generating them again.

A sample's tokens are the target's draws, and a draft is accepted where it equals them. So it is enough to draw the
drafts, with the sample's noise, and to walk along the sample as the engine does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from lockstep.engine import SamplingParams
from lockstep.engine.request import Request
from lockstep.engine.speculation.ngram import NgramDrafter
from lockstep.trainer_bridge.drafts.draft_batch import DraftSequence
from lockstep.trainer_bridge.drafts.unrolled_draft import UnrolledDraft

# How many tokens are known -> drafts for those that follow.
Propose = Callable[[int], Sequence[int]]


@dataclass(frozen=True)
class HeldOut:
    """A finished sample with the target's states. seed: of its draws."""

    sequence: DraftSequence
    num_prompt: int
    seed: int


def tokens_per_step(unrolled: UnrolledDraft, samples: Sequence[HeldOut], num_draft_tokens: int) -> float:
    """Of the draft model: tokens that a decoding step of the engine would give, in the mean over these samples."""
    chains = unrolled.draw([sample.sequence for sample in samples], [sample.seed for sample in samples])
    pairs = zip(samples, chains, strict=True)
    return _ratio([_walk(sample, _chained(sample, chain, num_draft_tokens)) for sample, chain in pairs])


def ngram_tokens_per_step(samples: Sequence[HeldOut], num_draft_tokens: int) -> float:
    """Of n-gram drafts from each sample's own text: what they give while none of the prompt's others has finished."""
    return _ratio([_walk(sample, _ngram(sample, num_draft_tokens)) for sample in samples])


def _chained(sample: HeldOut, chain: torch.Tensor, num_draft_tokens: int) -> Propose:
    def propose(known: int) -> list[int]:
        if known == sample.num_prompt + 1:
            return []  # a step that prefills drafts nothing
        # The row of the newest token but one knows the newest, and drafts what follows.
        return chain[known - 2, :num_draft_tokens].tolist()

    return propose


def _ngram(sample: HeldOut, num_draft_tokens: int) -> Propose:
    drafter, tokens = NgramDrafter(), sample.sequence.token_ids
    request = Request(0, list(tokens[: sample.num_prompt]), SamplingParams())

    def propose(known: int) -> list[int]:
        request.tokens.extend(tokens[len(request.tokens) : known])
        return drafter.propose(request, num_draft_tokens)[:num_draft_tokens]

    return propose


def _walk(sample: HeldOut, propose: Propose) -> tuple[int, int]:
    """(tokens, steps) after the sample's first token, which its prefill drew."""
    tokens = sample.sequence.token_ids
    known, steps = sample.num_prompt + 1, 0
    while known < len(tokens):
        accepted = 0
        for draft, token in zip(propose(known), tokens[known:], strict=False):
            if draft != token:
                break
            accepted += 1
        known = min(len(tokens), known + accepted + 1)
        steps += 1
    return len(tokens) - sample.num_prompt - 1, steps


def _ratio(walks: Sequence[tuple[int, int]]) -> float:
    return sum(tokens for tokens, _ in walks) / max(1, sum(steps for _, steps in walks))
