"""Samples the next token of each request from its logits; or reads its reward, where the model has a scalar head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from lockstep.engine.request import Request
from lockstep.engine.speculation.verification import taken_drafts
from lockstep.engine.steps.layout import StepLayout
from lockstep.engine.steps.target import Computed, Target
from lockstep.engine.steps.transfer import to_device
from lockstep.kernels.sampling.log_probs import token_log_probs
from lockstep.kernels.sampling.penalties import Ragged, apply_penalties
from lockstep.kernels.sampling.sampling import sample, sample_with_log_probs


class Sampled(NamedTuple):
    """tokens, int64 [R], and logprobs, fp32 [R], of R rows. Of a scalar head: -1 for a value that is no number, else 0;
    and the values."""

    tokens: torch.Tensor
    logprobs: torch.Tensor


class Sampler:
    """Holds the sampling parameters of the running requests as arrays by slot, so that a step only gathers them."""

    def __init__(self, target: Target):
        self.target = target
        self.device = target.device
        num_slots = len(target.last_tokens)
        self.occupants: list[Request | None] = [None] * num_slots
        self.temperature = np.ones(num_slots, np.float32)
        self.top_p = np.ones(num_slots, np.float32)
        self.min_p = np.zeros(num_slots, np.float32)
        self.top_k = np.full(num_slots, -1, np.int64)
        self.seed = np.zeros(num_slots, np.int64)
        self.truncates = np.zeros(num_slots, bool)
        self.edits_logits = np.zeros(num_slots, bool)

    def enter(self, requests: Sequence[Request]) -> None:
        """The requests begin to run, in their slots."""
        for request in requests:
            slot, params = request.slot, request.params
            self.occupants[slot] = request
            self.temperature[slot] = params.temperature
            self.top_p[slot] = params.top_p
            self.top_k[slot] = params.top_k
            self.min_p[slot] = params.min_p
            self.seed[slot] = request.seed
            self.truncates[slot] = params.truncates
            self.edits_logits[slot] = params.edits_logits

    def run(self, layout: StepLayout, computed: Computed) -> Sampled:
        """Samples for each request of the layout; its tokens are pending then.

        Of several rows of a request, whichever is last in `last_tokens` will not be read: no step follows unseen.
        """
        if computed.logits is None:
            return _NOTHING
        _, slots, positions = computed.rows
        taken = taken_drafts(layout.drafts) if len(slots) > len(layout.sampled) else None
        sampled = self.sample(computed.logits, slots, positions + 1, taken)
        if self.target.model.ranks is not None:
            self.target.model.ranks.broadcast(sampled.tokens)
        self.target.last_tokens.index_copy_(0, computed.slots, sampled.tokens)
        for request in layout.sampled:
            request.num_pending += 1
        return sampled

    def follow(self, computed: Computed) -> None:
        """On the other ranks: takes the tokens that rank 0 samples."""
        if computed.rows.size:
            tokens = torch.empty(computed.rows.shape[1], dtype=torch.int64, device=self.device)
            self.target.model.ranks.broadcast(tokens)
            self.target.last_tokens.index_copy_(0, computed.slots, tokens)

    def sample(
        self,
        logits: torch.Tensor,
        slots: np.ndarray,
        positions: np.ndarray,
        drafted: Sequence[Sequence[int]] | None = None,
    ) -> Sampled:
        """logits: [B, V].

        slots, positions: int64 [B], of the request of a row, and of the token that is sampled.
        drafted: per row, what to sample as if the request's tokens went on with; a request may then have several rows.

        A row whose logits hold no number to sample from gets token -1.

        The log-prob is of log-softmax(logits / temperature), before penalties, bias and truncation (at temperature 1
        for greedy requests): the number that a trainer, which knows only the weights, computes for the token.
        """
        integers = np.concatenate((positions, self.seed[slots], self.top_k[slots]))
        reals = (self.temperature[slots], self.top_p[slots], self.min_p[slots])
        sent = self._send(np.concatenate((integers.view(np.float32), *reals)))  # in one copy
        positions, seeds, top_k = sent[: 2 * integers.size].view(torch.int64).view(3, -1)
        temperature, top_p, min_p = sent[2 * integers.size :].view(3, -1)
        parameters = (temperature, top_k, top_p, min_p, seeds, positions)
        if not self.edits_logits[slots].any():
            return Sampled(*sample_with_log_probs(logits, *parameters, truncates=bool(self.truncates[slots].any())))
        tokens = sample(self._edited(logits, slots, drafted), *parameters)
        return Sampled(tokens, token_log_probs(logits, tokens, temperature))

    def _edited(self, logits: torch.Tensor, slots: np.ndarray, drafted: Sequence[Sequence[int]] | None) -> torch.Tensor:
        """The logits with penalties and biases, in fp32; the given ones stay, since the log-probs need them."""
        rows = np.flatnonzero(self.edits_logits[slots])
        edited = [self.occupants[slots[row]] for row in rows]
        outputs = [request.output_ids for request in edited]
        if drafted is not None:
            outputs = [[*output, *drafted[row]] for output, row in zip(outputs, rows, strict=True)]
        params = [request.params for request in edited]
        biases = [param.logit_bias or {} for param in params]
        bias_values = [value for bias in biases for value in bias.values()]
        logits = logits.to(torch.float32, copy=True)
        apply_penalties(
            logits,
            self._send(rows),
            Ragged.from_lists([request.prompt_ids for request in edited]).to(self.device),
            Ragged.from_lists(outputs).to(self.device),
            torch.tensor([param.repetition_penalty for param in params], dtype=torch.float32, device=self.device),
            torch.tensor([param.presence_penalty for param in params], dtype=torch.float32, device=self.device),
            torch.tensor([param.frequency_penalty for param in params], dtype=torch.float32, device=self.device),
            Ragged.from_lists([list(bias) for bias in biases]).to(self.device),
            torch.tensor(bias_values, dtype=torch.float32, device=self.device),
        )
        return logits

    def _send(self, values: np.ndarray) -> torch.Tensor:
        return to_device(values, self.device)


class RewardReader:
    """In the place of a sampler, for a model with a scalar head: its values are the rewards."""

    def enter(self, requests: Sequence[Request]) -> None:
        pass

    def run(self, layout: StepLayout, computed: Computed) -> Sampled:
        if computed.logits is None:
            return _NOTHING
        values = computed.logits.squeeze(1)
        for request in layout.sampled:
            request.num_pending += 1
        return Sampled(values.isfinite().long() - 1, values)

    def follow(self, computed: Computed) -> None:
        """Every rank has the values."""


_NOTHING = Sampled(torch.empty(0, dtype=torch.int64, device="cpu"), torch.empty(0, dtype=torch.float32, device="cpu"))
