"""Draws the next token of each request from its logits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from lockstep.engine.request import Request
from lockstep.kernels.log_probs import token_log_probs
from lockstep.kernels.penalties import Ragged, apply_penalties
from lockstep.kernels.sampling import sample


class Sampler:
    """Holds the sampling parameters of the running requests as arrays by slot, so that a step only gathers them."""

    def __init__(self, num_slots: int, device: torch.device):
        self.device = device
        self.occupants: list[Request | None] = [None] * num_slots
        self.temperature = np.ones(num_slots, np.float32)
        self.top_p = np.ones(num_slots, np.float32)
        self.min_p = np.zeros(num_slots, np.float32)
        self.top_k = np.full(num_slots, -1, np.int64)
        self.seed = np.zeros(num_slots, np.int64)
        self.edits_logits = np.zeros(num_slots, bool)

    def draw(self, logits: torch.Tensor, requests: Sequence[Request]) -> tuple[torch.Tensor, torch.Tensor]:
        """logits: fp32 [B, V], one row per request. Returns the tokens drawn, int64 [B], and their log-probs, fp32 [B].

        A row whose logits hold no number to draw from gets token -1.

        The log-prob is of log-softmax(logits / temperature), before penalties, bias and truncation (at temperature 1
        for greedy requests): the number that a trainer, which knows only the weights, computes for the token.
        """
        slots = np.array([self._slot(request) for request in requests])
        positions = np.array([request.num_tokens for request in requests])
        temperature = self._rows(self.temperature, slots)
        tokens = sample(
            self._edited(logits, requests, np.flatnonzero(self.edits_logits[slots])),
            temperature,
            self._rows(self.top_k, slots),
            self._rows(self.top_p, slots),
            self._rows(self.min_p, slots),
            self._rows(self.seed, slots),
            torch.from_numpy(positions).to(self.device),
        )
        return tokens, token_log_probs(logits, tokens, temperature)

    def _slot(self, request: Request) -> int:
        slot = request.slot
        if self.occupants[slot] is not request:
            self.occupants[slot] = request
            params = request.params
            self.temperature[slot] = params.temperature
            self.top_p[slot] = params.top_p
            self.top_k[slot] = params.top_k
            self.min_p[slot] = params.min_p
            self.seed[slot] = request.seed
            self.edits_logits[slot] = params.edits_logits
        return slot

    def _edited(self, logits: torch.Tensor, requests: Sequence[Request], rows: np.ndarray) -> torch.Tensor:
        """The logits with penalties and biases; the given ones stay as they are, since the log-probs need them."""
        if len(rows) == 0:
            return logits
        edited = [requests[row] for row in rows]
        params = [request.params for request in edited]
        biases = [param.logit_bias or {} for param in params]
        bias_values = [value for bias in biases for value in bias.values()]
        logits = logits.clone()
        apply_penalties(
            logits,
            torch.from_numpy(rows).to(self.device),
            Ragged.from_lists([request.prompt_ids for request in edited]).to(self.device),
            Ragged.from_lists([request.output_ids for request in edited]).to(self.device),
            torch.tensor([param.repetition_penalty for param in params], device=self.device),
            torch.tensor([param.presence_penalty for param in params], device=self.device),
            torch.tensor([param.frequency_penalty for param in params], device=self.device),
            Ragged.from_lists([list(bias) for bias in biases]).to(self.device),
            torch.tensor(bias_values, dtype=torch.float32, device=self.device),
        )
        return logits

    def _rows(self, values: np.ndarray, slots: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values[slots]).to(self.device)
