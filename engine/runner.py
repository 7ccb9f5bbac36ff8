"""Runs one step's batch through the model: token ids in, drawn tokens and log-probs out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from lockstep.engine.decode_graphs import DecodeGraphs
from lockstep.engine.models.decoder import AttentionContext, AttentionPart, Decoder, new_layer_caches
from lockstep.engine.prefix_groups import PrefixGroups, find_groups, order_by_prefix
from lockstep.engine.rank_step import RankStep
from lockstep.engine.request import Request
from lockstep.engine.sampler import Sampler
from lockstep.engine.scheduler import Chunk, SchedulerConfig, StepBatch
from lockstep.engine.speculation.verification import Verified, num_valid, rows_to_draw
from lockstep.engine.transfer import to_device, to_host
from lockstep.kernels.attention_plan import GROUP_ROWS, Groups, num_attention_items, plan_attention
from lockstep.kernels.attention_triton import KV_TILE
from lockstep.kernels.log_probs import token_log_probs
from lockstep.kernels.step_inputs import step_inputs

MAX_ATTENTION_ITEMS = 8192  # bounds the workspace of planned attention; larger steps go without a plan
SCORED_ROWS_AT_ONCE = 1024  # bounds the logits of scoring at [1024, vocab]
PENDING = -1  # a token that only the device knows

# Is told of each step's chunks, whose rows lie end to end in: hidden states [T, H], aux states [T, A * H].
Observer = Callable[[Sequence[Chunk], torch.Tensor, torch.Tensor], None]


@dataclass(frozen=True)
class LaunchedStep:
    """A step whose results are on their way: `tokens` and `logprobs` of `drawing`, and log-probs per scored chunk.

    A request of `drawing` has as many tokens as `drafts`, and one more.

    The tensors are the host's; they hold the results once `ready` has happened (at once where it is None).
    """

    weight_version: int
    requests: list[Request]
    drawing: list[Request]
    drafts: list[Sequence[int]]
    tokens: torch.Tensor
    logprobs: torch.Tensor
    scored: list[tuple[Chunk, torch.Tensor]]
    ready: torch.cuda.Event | None


class Collected(NamedTuple):
    """What the requests of a step got.

    served:   those that got what they were due, in the order of the batch.
    broken:   those whose logits held no number to draw from.
    verified: those of which drafts were verified.
    Requests that had ended before get nothing and are in none.
    """

    served: list[Request]
    broken: list[Request]
    verified: list[Verified]


class Runner:
    """Owns the KV cache and the page table, and turns a `StepBatch` into tensors for the model.

    On a GPU nothing here waits for the device but `collect`: inputs go over in asynchronous copies, drawn tokens stay
    in `last_tokens` for the step after, and a pure decode step is one graph.

    With a model over several ranks each has a runner: rank 0's tells the others of a step by `announce` before it
    takes part itself, and theirs follow. These steps are launched eagerly: NCCL's collectives are not captured.
    """

    def __init__(
        self,
        model: Decoder,
        config: SchedulerConfig,
        num_pages: int,
        device: torch.device,
        dtype: torch.dtype,
        cuda_graphs: bool = True,
        group_prefixes: bool = True,
        announce: Callable[[RankStep], None] | None = None,
    ):
        self.model = model
        self.announce = announce
        self.page_size = config.page_size
        self.device = device
        self.on_gpu = device.type == "cuda"
        shape = model.local_config
        self.cache_shape = (shape, num_pages, config.page_size, dtype, device)
        self.kv_caches: list[tuple[torch.Tensor, ...]] = []
        # The table's copy on the device is brought up to date with what each step's requests gained.
        self.host_page_table = np.zeros(
            (config.max_running_requests, -(-config.max_model_len // self.page_size)), np.int32
        )
        self.page_table = torch.from_numpy(self.host_page_table).to(device)
        self.last_tokens = torch.zeros(config.max_running_requests, dtype=torch.int64, device=device)
        self.sampler = Sampler(config.max_running_requests, device)
        self.group_prefixes = group_prefixes and shape.mla is None
        # Latent attention has one kernel for prefill and decode, which goes without plans.
        self.windows = set(shape.layer_windows) if shape.mla is None else set()
        self.num_kv_heads = shape.num_kv_heads
        self.group_requests = max(1, GROUP_ROWS // (shape.num_heads // shape.num_kv_heads))
        self.graphs = None
        self.max_running_requests = config.max_running_requests
        self.cuda_graphs = self.on_gpu and cuda_graphs and model.ranks is None
        self.aux_layers: tuple[int, ...] = ()
        self.observer: Observer | None = None
        self.take_kv_cache()

    def observe(self, aux_layers: tuple[int, ...], observer: Observer | None) -> None:
        """From the next step on the observer is told of the hidden states of all rows; None: nobody is."""
        self.aux_layers, self.observer = aux_layers, observer
        self.forget_graphs()

    def forget_graphs(self) -> None:
        """Graphs are captured anew at their next use: the tensors that they read were replaced."""
        if self.cuda_graphs:
            self.graphs = DecodeGraphs(self._decode_logits, self.max_running_requests, self.device)

    def take_kv_cache(self) -> None:
        """Memory for the cache, at first and after `free_kv_cache`."""
        self.kv_caches = new_layer_caches(*self.cache_shape)
        self.forget_graphs()

    def free_kv_cache(self) -> None:
        """Gives the cache's memory back to the device, until `take_kv_cache`."""
        self.kv_caches = []
        if self.on_gpu:
            self.graphs = None  # they hold memory of their own, and the addresses of the old cache
            torch.cuda.empty_cache()

    @torch.inference_mode()
    def launch(self, batch: StepBatch, weight_version: int) -> LaunchedStep:
        """Starts the computation of the batch; `collect` gives its requests what they are due."""
        # On a GPU decodes and prefills take different attention kernels, so each kind's rows lie together.
        chunks = sorted(batch.chunks, key=_is_prefill) if self.on_gpu else batch.chunks
        new_pages = self._new_pages(chunks)
        self._put_pages(new_pages)
        if self.on_gpu and self.group_prefixes and not _is_prefill(chunks[-1]):
            order = order_by_prefix(self.host_page_table, [chunk.request.slot for chunk in chunks])
            chunks = [chunks[index] for index in order]
        num_decodes = sum([chunk.length == 1 for chunk in chunks]) if self.on_gpu else 0
        drawing = [chunk.request for chunk in chunks if chunk.samples]
        drafts = [chunk.drafts for chunk in chunks if chunk.samples]
        rows = _rows(chunks, batch.num_tokens)
        if self.graphs is not None and len(drawing) == len(chunks) == num_decodes and self._fits_a_plan(rows):
            (logits, *states), slots = self.graphs.run(rows, self._groups(rows))
            if self.observer is not None:
                self.observer(chunks, *states)
            tokens, logprobs = self._draw(logits, drawing, drafts, slots)
            scored = []
        else:
            step = _rank_step(rows, chunks, num_decodes, new_pages)
            if self.announce is not None:
                self.announce(step)
            tokens, logprobs, scored = self._launch_eagerly(step, chunks, drawing, drafts)
        ready = None
        if self.on_gpu:
            ready = torch.cuda.Event()
            ready.record()
        requests = [chunk.request for chunk in batch.chunks if chunk.samples or chunk.request.kind == "score"]
        return LaunchedStep(weight_version, requests, drawing, drafts, tokens, logprobs, scored, ready)

    @torch.inference_mode()
    def follow(self, step: RankStep) -> None:
        """Takes part in a step of rank 0: the same calls of the model, in the same order."""
        self._put_pages(step.new_pages)
        _, slots, hidden, _ = self._logits(step)
        if len(step.drawing):
            tokens = torch.empty(len(step.drawing), dtype=torch.int64, device=self.device)
            self.model.ranks.broadcast(tokens)
            self.last_tokens.index_copy_(0, slots, tokens)
        for first, end in step.scored.T:
            for states in hidden[first:end].split(SCORED_ROWS_AT_ONCE):
                self.model.logits(states)

    def collect(self, step: LaunchedStep) -> Collected:
        """Waits for the step, and appends to each request what it is due: tokens, or log-probs of its tokens."""
        if step.ready is not None:
            step.ready.synchronize()
        tokens, logprobs = step.tokens.tolist(), step.logprobs.tolist()
        broken, verified = [], []
        first = 0
        for request, drafts in zip(step.drawing, step.drafts, strict=True):
            rows = range(first, first + 1 + len(drafts))
            first = rows.stop
            request.num_pending -= 1
            if request.finish_reason is not None:
                continue
            if drafts:
                verified.append(Verified(request, len(drafts), len(request.logprobs)))
                rows = rows[: num_valid(tokens[first - len(rows) : first], drafts)]
            elif tokens[rows.start] < 0:
                rows = rows[:0]
            if not rows:
                broken.append(request)
            for row in rows:
                request.append(tokens[row], logprobs[row], step.weight_version)
        for chunk, scores in step.scored:
            del chunk.request.logprobs[chunk.start :]  # a preempted request starts over
            chunk.request.logprobs += scores.tolist()
        served = [r for r in step.requests if r.finish_reason is None and r not in broken]
        return Collected(served, broken, verified)

    def _launch_eagerly(
        self, step: RankStep, chunks: Sequence[Chunk], drawing: list[Request], drafts: list[Sequence[int]]
    ) -> tuple[torch.Tensor, torch.Tensor, list[tuple[Chunk, torch.Tensor]]]:
        """(tokens and log-probs drawn, log-probs of each scored chunk), host-bound."""
        logits, slots, hidden, aux = self._logits(step)
        if self.observer is not None:
            self.observer(chunks, hidden, aux)
        tokens, logprobs = self._draw(logits, drawing, drafts, slots)
        scored = [chunk for chunk in chunks if chunk.request.kind == "score"]
        scores = [
            (chunk, to_host(self._scores(hidden[first:end], chunk)))
            for chunk, (first, end) in zip(scored, step.scored.T, strict=True)
        ]
        return tokens, logprobs, scores

    def _logits(self, step: RankStep) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor, torch.Tensor]:
        """(logits to draw from if any, the slots of their rows, hidden states: of all rows if they are scored or
        observed, aux states of all rows)."""
        # Scoring wants all hidden states, otherwise only those that tokens are drawn from are.
        wants_all = step.scored.size > 0 or self.observer is not None
        hidden, slots, aux = self._forward(step, None if wants_all else step.drawing)
        drawing_hidden = hidden
        if wants_all and len(step.drawing):
            drawing_rows = self._send(step.drawing)
            drawing_hidden, slots = hidden[drawing_rows], slots[drawing_rows]
        return self.model.logits(drawing_hidden) if len(step.drawing) else None, slots, hidden, aux

    def _forward(self, step: RankStep, wanted: np.ndarray | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(hidden states [R, H], slots [R]) of the `wanted` rows, or of all, and aux states [T, A * H] of all."""
        rows, num_decodes = step.rows, step.num_decodes
        slots, lengths, kv_lens = step.prefills
        num_rows, num_prefills = rows.shape[1], len(slots)
        sent = self._send(np.concatenate((rows.ravel(), slots, kv_lens, [0], np.cumsum(lengths))))
        tokens, requests, positions = sent[: 3 * num_rows].view(3, num_rows)
        request_arrays = sent[3 * num_rows :]
        parts = []
        if num_decodes:
            planned = self._fits_a_plan(rows[:, :num_decodes])
            parts.append(self._decode_part(requests[:num_decodes], positions[:num_decodes], planned=planned))
        if num_prefills:
            widest = -(-int(kv_lens.max()) // self.page_size)
            int32s = request_arrays[num_prefills:].to(torch.int32)
            part = AttentionPart(
                num_rows=num_rows - num_decodes,
                page_table=self.page_table[:, :widest].index_select(0, request_arrays[:num_prefills]),
                cu_seqlens_q=int32s[num_prefills:],
                kv_lens=int32s[:num_prefills],
            )
            parts.append(part)
        last_context, last_requests = None, requests
        token_ids, kv_slots = self._step_inputs(tokens, requests, positions)
        if wanted is not None and len(wanted) < num_rows:
            wanted_rows = self._send(wanted)
            planned = self.on_gpu and len(wanted) > 0 and self._fits_a_plan(rows[:, wanted])
            last_requests = requests[wanted_rows]
            part = self._decode_part(last_requests, positions[wanted_rows], planned=planned)
            last_context = AttentionContext(self.kv_caches, kv_slots, (part,), wanted_rows)
        context = AttentionContext(self.kv_caches, kv_slots, tuple(parts))
        hidden, aux = self.model.forward_with_aux(token_ids, positions, context, self.aux_layers, last_context)
        return hidden, last_requests, aux

    def _decode_logits(self, rows: torch.Tensor, groups: Groups | None) -> tuple[torch.Tensor, ...]:
        """Logits [B, V] of a decode step, and where they are observed its hidden and its aux states.

        rows: int64 [3, B], tokens, requests (-1: padding) and positions.
        """
        tokens, requests, positions = rows
        token_ids, kv_slots = self._step_inputs(tokens, requests, positions)
        part = self._decode_part(requests, positions, groups)
        context = AttentionContext(self.kv_caches, kv_slots, (part,))
        hidden, aux = self.model.forward_with_aux(token_ids, positions, context, self.aux_layers)
        logits = self.model.logits(hidden)
        return (logits,) if self.observer is None else (logits, hidden, aux)

    def _step_inputs(
        self, tokens: torch.Tensor, requests: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return step_inputs(tokens, requests, positions, self.last_tokens, self.page_table, self.page_size)

    def _decode_part(
        self, requests: torch.Tensor, positions: torch.Tensor, groups: Groups | None = None, planned: bool = True
    ) -> AttentionPart:
        kv_lens = torch.where(requests >= 0, positions + 1, 0).to(torch.int32)
        cu_seqlens_q = torch.arange(len(requests) + 1, dtype=torch.int32, device=self.device)
        plans = {
            window: plan_attention(
                kv_lens, cu_seqlens_q, self.num_kv_heads, MAX_ATTENTION_ITEMS, window=window, groups=groups
            )
            for window in (self.windows if planned else ())
        }
        page_table = self.page_table.index_select(0, requests.clamp(min=0))
        return AttentionPart(len(requests), page_table, cu_seqlens_q, kv_lens, plans)

    def _fits_a_plan(self, rows: np.ndarray) -> bool:
        return num_attention_items(rows[2] + 1) <= MAX_ATTENTION_ITEMS

    def _groups(self, rows: np.ndarray) -> PrefixGroups | None:
        """The groups of a decode step that share a prefix."""
        if not self.group_prefixes:
            return None
        _, slots, positions = rows
        pages = self.host_page_table[slots, : int(positions.max()) // self.page_size + 1]
        return find_groups(pages, positions + 1, self.page_size, KV_TILE, self.group_requests)

    def _new_pages(self, chunks: Sequence[Chunk]) -> np.ndarray:
        """int64 [2, N]: places in the page table, as one row, and the pages that the requests have gained there."""
        width = self.host_page_table.shape[1]
        places: list[int] = []
        pages: list[int] = []
        for chunk in chunks:
            request = chunk.request
            synced, held = request.num_pages_synced, request.pages
            if synced < len(held):
                places += range(request.slot * width + synced, request.slot * width + len(held))
                pages += held[synced:]
                request.num_pages_synced = len(held)
        return np.array([places, pages], np.int64)

    def _put_pages(self, new_pages: np.ndarray) -> None:
        """Brings the page table up to date."""
        if not new_pages.size:
            return
        np.put(self.host_page_table, *new_pages)
        if self.on_gpu:
            place, page = self._send(new_pages)
            self.page_table.view(-1).index_copy_(0, place, page.to(torch.int32))

    def _draw(
        self,
        logits: torch.Tensor | None,
        drawing: list[Request],
        drafts: list[Sequence[int]],
        slots: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Draws for each request; the tokens are pending then. Returns tokens and log-probs, host-bound.

        Of several rows of a request, whichever is last in `last_tokens` will not be read: no step follows unseen.
        """
        if logits is None:
            return torch.empty(0, dtype=torch.int64), torch.empty(0)
        rows = rows_to_draw(drawing, drafts) if any(drafts) else (drawing,)
        tokens, logprobs = self.sampler.draw(logits, *rows)
        if self.model.ranks is not None:
            self.model.ranks.broadcast(tokens)
        self.last_tokens.index_copy_(0, slots, tokens)
        for request in drawing:
            request.num_pending += 1
        return to_host(tokens), to_host(logprobs)

    def _scores(self, hidden: torch.Tensor, chunk: Chunk) -> torch.Tensor:
        """Log-probs of the tokens that follow those of the chunk, from the hidden states of `_num_scored` rows."""
        request = chunk.request
        targets = self._send(np.array(request.tokens[chunk.start + 1 : chunk.start + 1 + len(hidden)], np.int64))
        temperature = torch.full(targets.shape, request.params.temperature, device=self.device)
        scores = [
            token_log_probs(self.model.logits(states), wanted, temperature[: len(wanted)])
            for states, wanted in zip(
                hidden.split(SCORED_ROWS_AT_ONCE), targets.split(SCORED_ROWS_AT_ONCE), strict=True
            )
        ]
        return torch.cat(scores)

    def _send(self, values: np.ndarray) -> torch.Tensor:
        return to_device(values, self.device)


def _is_prefill(chunk: Chunk) -> bool:
    return chunk.length > 1


def _rank_step(rows: np.ndarray, chunks: Sequence[Chunk], num_decodes: int, new_pages: np.ndarray) -> RankStep:
    """The step whose rows are those of chunks laid end to end, of which the first num_decodes are of one token."""
    ends = np.cumsum([chunk.length for chunk in chunks])
    prefills = chunks[num_decodes:]
    lengths = [chunk.length for chunk in prefills]
    kv_lens = [chunk.start + chunk.length for chunk in prefills]
    scored = [
        (end - chunk.length, end - chunk.length + _num_scored(chunk))
        for chunk, end in zip(chunks, ends.tolist(), strict=True)
        if chunk.request.kind == "score"
    ]
    return RankStep(
        rows=rows,
        prefills=np.array([[chunk.request.slot for chunk in prefills], lengths, kv_lens], np.int64),
        drawing=_drawing_rows(chunks, ends),
        scored=np.array(scored, np.int64).reshape(-1, 2).T,
        new_pages=new_pages,
    )


def _drawing_rows(chunks: Sequence[Chunk], ends: np.ndarray) -> np.ndarray:
    """The last row of each chunk that samples, or with drafts the last 1 + len(drafts)."""
    if not any(chunk.drafts for chunk in chunks):
        return ends[[chunk.samples for chunk in chunks]] - 1
    sampled = [(chunk, end) for chunk, end in zip(chunks, ends.tolist(), strict=True) if chunk.samples]
    return np.concatenate([np.arange(end - 1 - len(chunk.drafts), end) for chunk, end in sampled])


def _num_scored(chunk: Chunk) -> int:
    """Rows of the chunk that another known token follows: the last token of all predicts none."""
    return min(chunk.length, len(chunk.request.tokens) - 1 - chunk.start)


def _rows(chunks: Sequence[Chunk], num_rows: int) -> np.ndarray:
    """int64 [3, T]: token (or PENDING), slot and position of each row of chunks laid end to end."""
    starts = [chunk.start for chunk in chunks]
    slots = [chunk.request.slot for chunk in chunks]
    if len(chunks) == num_rows:
        tokens = [PENDING if chunk.request.num_pending else chunk.request.tokens[chunk.start] for chunk in chunks]
        return np.array((tokens, slots, starts), np.int64)
    tokens = []
    for chunk in chunks:
        if chunk.request.num_pending:
            tokens.append(PENDING)
        else:
            tokens += chunk.request.tokens[chunk.start : chunk.start + chunk.length]
            tokens += chunk.drafts
    lengths = np.array([chunk.length for chunk in chunks])
    begins = np.cumsum(lengths) - lengths
    rows = np.empty((3, num_rows), np.int64)
    rows[0] = tokens
    rows[1] = np.repeat(slots, lengths)
    rows[2] = np.arange(num_rows) + np.repeat(np.array(starts) - begins, lengths)
    return rows
