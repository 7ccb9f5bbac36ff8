"""Runs one step's batch through the model: token ids in, drawn tokens and log-probs out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from lockstep.engine.models.decoder import AttentionContext, Decoder
from lockstep.engine.request import Request
from lockstep.engine.sampler import Sampler
from lockstep.engine.scheduler import Chunk, SchedulerConfig, StepBatch
from lockstep.kernels.kv_cache import new_kv_cache
from lockstep.kernels.log_probs import token_log_probs

SCORED_ROWS_AT_ONCE = 1024  # bounds the logits of scoring at [1024, vocab]


class Runner:
    """Owns the KV cache tensors, and turns a `StepBatch` into tensors for the model."""

    def __init__(
        self, model: Decoder, config: SchedulerConfig, num_pages: int, device: torch.device, dtype: torch.dtype
    ):
        self.model = model
        self.page_size = config.page_size
        self.device = device
        shape = model.config
        self.kv_caches = [
            new_kv_cache(num_pages, config.page_size, shape.num_kv_heads, shape.head_dim, dtype, device)
            for _ in range(shape.num_layers)
        ]
        pages_per_request = -(-config.max_model_len // config.page_size)
        self.page_table = np.zeros((config.max_running_requests, pages_per_request), np.int32)
        self.sampler = Sampler(config.max_running_requests, device)

    @torch.inference_mode()
    def run(self, batch: StepBatch, weight_version: int) -> list[Request]:
        """Computes the batch and appends to each request what it was due: a drawn token, or log-probs of its tokens.

        Returns the requests that were given something, in the order of the batch.
        """
        chunks = batch.chunks
        ends = np.cumsum([chunk.length for chunk in chunks])
        hidden = self.model(*self._inputs(chunks, ends))
        drawing = [(chunk.request, end - 1) for chunk, end in zip(chunks, ends, strict=True) if chunk.samples]
        if drawing:
            self._draw(hidden, drawing, weight_version)
        scoring = [(chunk, end) for chunk, end in zip(chunks, ends, strict=True) if chunk.request.kind == "score"]
        for chunk, end in scoring:
            self._score(hidden[end - chunk.length : end], chunk)
        return [chunk.request for chunk in chunks if chunk.samples or chunk.request.kind == "score"]

    def _inputs(self, chunks: Sequence[Chunk], ends: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, AttentionContext]:
        """(token_ids [T], positions [T], context) of the chunks laid end to end."""
        starts = np.array([chunk.start for chunk in chunks])
        slots = np.array([self._synced_slot(chunk.request) for chunk in chunks])
        lengths = np.diff(ends, prepend=0)
        if len(chunks) == ends[-1]:  # every chunk is one token: a decode step
            token_ids = np.array([chunk.request.tokens[chunk.start] for chunk in chunks])
            rows, positions = slots, starts
        else:
            token_ids = np.concatenate(
                [chunk.request.tokens[chunk.start : chunk.start + chunk.length] for chunk in chunks]
            )
            rows = np.repeat(slots, lengths)
            positions = np.arange(ends[-1]) + np.repeat(starts - (ends - lengths), lengths)
        pages = self.page_table[rows, positions // self.page_size]
        kv_slots = pages.astype(np.int64) * self.page_size + positions % self.page_size
        kv_lens = starts + lengths
        widest = -(-int(kv_lens.max()) // self.page_size)
        context = AttentionContext(
            kv_caches=self.kv_caches,
            slots=self._tensor(kv_slots),
            page_table=self._tensor(self.page_table[slots, :widest]),
            cu_seqlens_q=self._tensor(np.concatenate(([0], ends)).astype(np.int32)),
            kv_lens=self._tensor(kv_lens.astype(np.int32)),
        )
        return self._tensor(token_ids), self._tensor(positions), context

    def _synced_slot(self, request: Request) -> int:
        """The request's row of the page table, brought up to date."""
        synced, pages = request.num_pages_synced, request.pages
        if synced < len(pages):
            self.page_table[request.slot, synced : len(pages)] = pages[synced:]
            request.num_pages_synced = len(pages)
        return request.slot

    def _draw(self, hidden: torch.Tensor, drawing: list[tuple[Request, int]], weight_version: int) -> None:
        requests = [request for request, _ in drawing]
        rows = torch.tensor([row for _, row in drawing], device=self.device)
        last = hidden if len(rows) == len(hidden) else hidden[rows]
        tokens, logprobs = self.sampler.draw(self.model.logits(last), requests)
        for request, token, logprob in zip(requests, tokens, logprobs, strict=True):
            request.append(token, logprob, weight_version)

    def _score(self, hidden: torch.Tensor, chunk: Chunk) -> None:
        """Appends the log-probs of the tokens that follow those of the chunk (the last token of all predicts none)."""
        request = chunk.request
        del request.logprobs[chunk.start :]  # a preempted request starts over
        targets = request.tokens[chunk.start + 1 : chunk.start + chunk.length + 1]
        for first in range(0, len(targets), SCORED_ROWS_AT_ONCE):
            wanted = torch.tensor(targets[first : first + SCORED_ROWS_AT_ONCE], device=self.device)
            temperature = torch.full((len(wanted),), request.params.temperature, device=self.device)
            logits = self.model.logits(hidden[first : first + len(wanted)])
            request.logprobs += token_log_probs(logits, wanted, temperature).tolist()

    def _tensor(self, values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values).to(self.device)
