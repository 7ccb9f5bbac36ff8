"""Log-probs of tokens that are known: what `Engine.score` asks for."""

from __future__ import annotations

import numpy as np
import torch

from lockstep.engine.scheduling.step_batch import Chunk
from lockstep.engine.steps.layout import StepLayout
from lockstep.engine.steps.target import Computed, Target
from lockstep.engine.steps.transfer import to_device, to_host
from lockstep.kernels.sampling.log_probs import token_log_probs

SCORED_ROWS_AT_ONCE = 1024  # bounds the logits of scoring at [1024, vocab]


class Scorer:
    """Scores the chunks of score requests, on rank 0; the other ranks compute their part of the logits."""

    def __init__(self, target: Target):
        self._target = target

    def run(self, layout: StepLayout, computed: Computed) -> list[tuple[Chunk, torch.Tensor]]:
        """Each scored chunk with its log-probs, fp32 [N], on their way to the host."""
        if not computed.scored.size:
            return []
        chunks = [chunk for chunk in layout.chunks if chunk.request.kind == "score"]
        return [
            (chunk, to_host(self._log_probs(computed.hidden[first:end], chunk)))
            for chunk, (first, end) in zip(chunks, computed.scored.T, strict=True)
        ]

    def follow(self, computed: Computed) -> None:
        for first, end in computed.scored.T:
            for states in computed.hidden[first:end].split(SCORED_ROWS_AT_ONCE):
                self._target.model.logits(states)

    def _log_probs(self, hidden: torch.Tensor, chunk: Chunk) -> torch.Tensor:
        """Of the tokens that follow those of the chunk, from the hidden states of its first rows."""
        request, device = chunk.request, self._target.device
        following = request.tokens[chunk.start + 1 : chunk.start + 1 + len(hidden)]
        targets = to_device(np.array(following, np.int64), device)
        temperature = torch.full(targets.shape, request.params.temperature, dtype=torch.float32, device=device)
        scores = [
            token_log_probs(self._target.model.logits(states), wanted, temperature[: len(wanted)])
            for states, wanted in zip(
                hidden.split(SCORED_ROWS_AT_ONCE), targets.split(SCORED_ROWS_AT_ONCE), strict=True
            )
        ]
        return torch.cat(scores)
