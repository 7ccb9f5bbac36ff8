"""Runs one step's batch through the model: token ids in, drawn tokens and log-probs out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from lockstep.engine.models.decoder import Decoder
from lockstep.engine.models.layers.context import AttentionContext, AttentionPart
from lockstep.engine.ranks.rank_step import RankStep
from lockstep.engine.request import Request
from lockstep.engine.scheduling.prefix_groups import PrefixGroups, find_groups, order_by_prefix
from lockstep.engine.scheduling.scheduler import Chunk, SchedulerConfig, StepBatch
from lockstep.engine.speculation.draft_runner import DraftRunner, TargetStep
from lockstep.engine.speculation.eagle import Chain, EagleDrafter
from lockstep.engine.speculation.step_graphs import StepGraphs
from lockstep.engine.speculation.step_rows import MAX_VERIFY_ITEMS, StepSize, pack, unpack
from lockstep.engine.speculation.verification import Verified, num_valid, taken_drafts
from lockstep.engine.steps.decode_graphs import DecodeGraphs, bucket_sizes
from lockstep.engine.steps.sampler import Sampler
from lockstep.engine.steps.transfer import to_device, to_host
from lockstep.kernels.attention.attention_plan import GROUP_ROWS, Groups, num_attention_items, plan_attention
from lockstep.kernels.attention.attention_triton import KV_TILE
from lockstep.kernels.memory.step_inputs import step_inputs
from lockstep.kernels.sampling.log_probs import token_log_probs

MAX_ATTENTION_ITEMS = 8192  # bounds the workspace of planned attention; larger steps go without a plan
SCORED_ROWS_AT_ONCE = 1024  # bounds the logits of scoring at [1024, vocab]
MAX_VERIFY_GRAPH_REQUESTS = 64  # larger steps that verify drafts are not worth the memory of a graph
PENDING = -1  # a token that only the device knows

# Is told of each step's chunks, whose rows lie end to end in: hidden states [T, H], aux states [T, A * H].
Observer = Callable[[Sequence[Chunk], torch.Tensor, torch.Tensor], None]


@dataclass(frozen=True)
class LaunchedStep:
    """A step whose results are on their way: `tokens` and `logprobs` of `drawing`, and log-probs per scored chunk.

    A request of `drawing` has as many tokens as `drafts`, and one more. chains [B, k]: drafts for its next step.

    The tensors are the host's; they hold the results once `ready` has happened (at once where it is None). Of a model
    with a scalar head, values stand in the place of log-probs, and 0 or -1 (no number) in that of tokens.
    """

    weight_version: int
    requests: list[Request]
    drawing: list[Request]
    drafts: list[Sequence[int]]
    tokens: torch.Tensor
    logprobs: torch.Tensor
    scored: list[tuple[Chunk, torch.Tensor]]
    chains: torch.Tensor | None
    ready: torch.cuda.Event | None


class Collected(NamedTuple):
    """What the requests of a step got.

    served:   those that got what they were due, in the order of the batch.
    broken:   those for which the model gave no number: logits with nothing to draw from, or a log-prob or a reward that
              is not finite. They have kept what they got before.
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
        drafter: EagleDrafter | None = None,
        num_draft_tokens: int = 0,
    ):
        self.model = model
        self.announce = announce
        self.page_size = config.page_size
        self.device = device
        self.on_gpu = device.type == "cuda"
        self.cache_shape = (num_pages, config.page_size, dtype)
        self.kv_caches: list[tuple[torch.Tensor, ...]] = []
        # The table's copy on the device is brought up to date with what each step's requests gained.
        self.host_page_table = np.zeros(
            (config.max_running_requests, -(-config.max_model_len // self.page_size)), np.int32
        )
        self.page_table = torch.from_numpy(self.host_page_table).to(device)
        self.last_tokens = torch.zeros(config.max_running_requests, dtype=torch.int64, device=device)
        self.sampler = Sampler(config.max_running_requests, device)
        self.plan_keys = model.local_config.plan_keys - {None}
        self.group_prefixes = group_prefixes and bool(self.plan_keys)
        most_queries = max((key.queries_per_kv_head for key in self.plan_keys), default=1)
        self.group_requests = max(1, GROUP_ROWS // most_queries)
        self.graphs = None
        self.max_running_requests = config.max_running_requests
        self.has_scalar_head = model.config.head == "scalar"
        self.follower = drafter and DraftRunner(drafter, self.page_table, self.last_tokens)
        self.aux_layers = drafter.draft.config.aux_layers if drafter else ()
        self.max_queries = 1 + num_draft_tokens
        self.verify_graphs = None
        self.cuda_graphs = self.on_gpu and cuda_graphs and model.ranks is None and not self.has_scalar_head
        self.observer: Observer | None = None
        self.take_kv_cache()

    def observe(self, aux_layers: tuple[int, ...], observer: Observer) -> None:
        """From the next step on the observer is told of the hidden states of all rows.

        Raises ValueError for other aux layers than those that a draft model reads here.
        """
        if self.follower is not None and aux_layers != self.aux_layers:
            raise ValueError(f"aux_layers={aux_layers}, but the engine's draft model reads {self.aux_layers}")
        self.aux_layers, self.observer = aux_layers, observer
        self.forget_graphs()

    def stop_observing(self) -> None:
        self.aux_layers, self.observer = self.aux_layers if self.follower is not None else (), None
        self.forget_graphs()

    def forget_graphs(self) -> None:
        """Graphs are captured anew at their next use: the tensors that they read were replaced."""
        if self.cuda_graphs:
            self.graphs = DecodeGraphs(self._decode_logits, self.max_running_requests, self.device)
            self.verify_graphs = StepGraphs(self._verify_logits)
            if self.follower is not None:
                self.follower.forget_graphs()

    def take_kv_cache(self) -> None:
        """Memory for the cache, at first and after `free_kv_cache`."""
        self.kv_caches = self.model.new_caches(*self.cache_shape)
        if self.follower is not None:
            self.follower.drafter.take_kv_cache()
        self.forget_graphs()

    def free_kv_cache(self) -> None:
        """Gives the cache's memory back to the device, until `take_kv_cache`."""
        self.kv_caches = []
        if self.follower is not None:
            self.follower.drafter.free_kv_cache()
            self.follower.graphs = None
        if self.on_gpu:
            self.graphs = self.verify_graphs = None  # they hold memory of their own, and addresses of the old cache
            torch.cuda.empty_cache()

    @torch.inference_mode()
    def launch(self, batch: StepBatch, weight_version: int, chains: bool = False) -> LaunchedStep:
        """Starts the computation of the batch; `collect` gives its requests what they are due.

        chains: and drafts for their next step, where there is a draft model.
        """
        new_pages = self._new_pages(batch.chunks)
        self._put_pages(new_pages)
        chunks, num_decodes = self._order(batch)
        drawing = [chunk.request for chunk in chunks if chunk.samples]
        drafts = [chunk.drafts for chunk in chunks if chunk.samples]
        rows = _rows(chunks, batch.num_tokens)
        scored = []
        if self.graphs is not None and len(drawing) == len(chunks) == num_decodes and self._fits_a_plan(rows):
            (logits, aux, hidden), slots = self.graphs.run(rows, self._groups(rows))
            if self.observer is not None:
                self.observer(chunks, hidden, aux)
            tokens, logprobs = self._draw(logits, rows, drawing, drafts, slots)
            drafted = self._follow_graph(rows, chunks, aux, tokens, chains)
        elif self.verify_graphs is not None and (size := self._verify_size(chunks, num_decodes)) is not None:
            packed = pack(rows, drawing, [chunk.length for chunk in chunks], self.page_size, size)
            logits, aux, hidden, slots = self.verify_graphs.run(size, (packed,), lambda: (self._no_rows(size),))
            num_rows = rows.shape[1]
            if self.observer is not None:
                self.observer(chunks, hidden[:num_rows], aux[:num_rows])
            tokens, logprobs = self._draw(logits[:num_rows], rows, drawing, drafts, slots[:num_rows])
            drafted = self._follow_graph(rows, chunks, aux[:num_rows], tokens, chains)
        else:
            step = _rank_step(rows, chunks, num_decodes, new_pages)
            if self.announce is not None:
                self.announce(step)
            tokens, logprobs, scored, drafted = self._launch_eagerly(step, chunks, drawing, drafts, chains)
        # In the order in which the device makes them.
        tokens, logprobs = to_host(tokens), to_host(logprobs)
        drafted = None if drafted is None else to_host(drafted)
        ready = None
        if self.on_gpu:
            ready = torch.cuda.Event()
            ready.record()
        requests = [chunk.request for chunk in batch.chunks if chunk.samples or chunk.request.kind == "score"]
        return LaunchedStep(weight_version, requests, drawing, drafts, tokens, logprobs, scored, drafted, ready)

    @torch.inference_mode()
    def follow(self, step: RankStep) -> None:
        """Takes part in a step of rank 0: the same calls of the model, in the same order."""
        self._put_pages(step.new_pages)
        _, slots, hidden, _ = self._logits(step)
        if len(step.drawing) and not self.has_scalar_head:
            tokens = torch.empty(len(step.drawing), dtype=torch.int64, device=self.device)
            self.model.ranks.broadcast(tokens)
            self.last_tokens.index_copy_(0, slots, tokens)
        for first, end in step.scored.T:
            for states in hidden[first:end].split(SCORED_ROWS_AT_ONCE):
                self.model.logits(states)

    def collect(self, step: LaunchedStep) -> Collected:
        """Waits for the step, and gives each request what it is due: tokens, log-probs of its tokens, or its reward."""
        if step.ready is not None:
            step.ready.synchronize()
        tokens, logprobs = step.tokens.tolist(), step.logprobs.tolist()
        broken, verified = [], []
        chains = [] if step.chains is None else step.chains.tolist()
        # Of most steps all numbers are finite, which their sum tells.
        are_finite = math.isfinite(sum(logprobs))
        end = 0
        for place, (request, drafts) in enumerate(zip(step.drawing, step.drafts, strict=True)):
            first, end = end, end + 1 + len(drafts)
            request.num_pending -= 1
            if request.finish_reason is not None:
                continue
            stop = end
            if drafts:
                verified.append(Verified(request, len(drafts), len(request.logprobs)))
                stop = first + num_valid(tokens[first:end], drafts)
            elif tokens[first] < 0:
                stop = first
            if not are_finite:
                stop = first + _num_finite(logprobs[first:stop])
            if stop == first:
                broken.append(request)
            elif request.kind == "reward":
                request.reward = logprobs[first]
                continue
            request.extend(tokens[first:stop], logprobs[first:stop], step.weight_version)
            if chains:
                request.drafter_state = Chain(len(request.tokens), chains[place])
        for chunk, scores in step.scored:
            values = scores.tolist()
            del chunk.request.logprobs[chunk.start :]  # a preempted request starts over
            if math.isfinite(sum(values)) or (num_finite := _num_finite(values)) == len(values):
                chunk.request.logprobs += values
            elif chunk.request.finish_reason is None:
                chunk.request.logprobs += values[:num_finite]
                broken.append(chunk.request)
        served = [r for r in step.requests if r.finish_reason is None and r not in broken]
        return Collected(served, broken, verified)

    def _launch_eagerly(
        self,
        step: RankStep,
        chunks: Sequence[Chunk],
        drawing: list[Request],
        drafts: list[Sequence[int]],
        chains: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, list[tuple[Chunk, torch.Tensor]], torch.Tensor | None]:
        """(tokens and log-probs drawn; log-probs of each scored chunk, host-bound; drafts for the next step)."""
        logits, slots, hidden, computed = self._logits(step)
        if self.observer is not None:
            self.observer(chunks, hidden, computed.aux)
        tokens, logprobs = self._draw(logits, step.rows[:, step.drawing], drawing, drafts, slots)
        scored = [chunk for chunk in chunks if chunk.request.kind == "score"]
        scores = [
            (chunk, to_host(self._scores(hidden[first:end], chunk)))
            for chunk, (first, end) in zip(scored, step.scored.T, strict=True)
        ]
        drafted = None
        if self.follower is not None:
            drafted = self.follower.follow(computed, chunks, step.drawing, tokens, chains)
        return tokens, logprobs, scores, drafted

    def _logits(self, step: RankStep) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor, TargetStep]:
        """(logits to draw from if any, the slots of their rows, hidden states, what else was computed).

        The hidden states are of all rows if any is scored, or they are observed, or a draft reads the last layer's.
        """
        # Otherwise only those that tokens are drawn from are wanted.
        reads_last_layer = self.model.config.num_layers in self.aux_layers
        wants_all = step.scored.size > 0 or self.observer is not None or reads_last_layer
        hidden, slots, computed = self._forward(step, None if wants_all else step.drawing)
        drawing_hidden = hidden
        if wants_all and len(step.drawing):
            drawing_rows = self._send(step.drawing)
            drawing_hidden, slots = hidden[drawing_rows], slots[drawing_rows]
        return self.model.logits(drawing_hidden) if len(step.drawing) else None, slots, hidden, computed

    def _forward(self, step: RankStep, wanted: np.ndarray | None) -> tuple[torch.Tensor, torch.Tensor, TargetStep]:
        """(hidden states [R, H], slots [R]) of the `wanted` rows, or of all; and what a draft needs of all."""
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
        return hidden, last_requests, TargetStep(aux, token_ids, requests, positions, kv_slots, context.parts)

    def _follow_graph(
        self, rows: np.ndarray, chunks: Sequence[Chunk], aux: torch.Tensor, draws: torch.Tensor, chains: bool
    ) -> torch.Tensor | None:
        """The draft's part after a step that was a graph. Drafts for the next one, if it `chains`."""
        if self.follower is None:
            return None
        lengths = [chunk.length for chunk in chunks]
        size = StepSize(self._bucket(len(chunks)), 1 if rows.shape[1] == len(chunks) else self.max_queries)
        packed = pack(rows, [chunk.request for chunk in chunks], lengths, self.page_size, size)
        drafted = self.follower.follow_graph(packed, size, aux, draws, chains)
        return None if drafted is None else drafted[: len(chunks)]

    def _verify_size(self, chunks: Sequence[Chunk], num_decodes: int) -> StepSize | None:
        """The graph for a step in which all rows are drawn from and some are drafts; None where there is none."""
        if num_decodes == len(chunks) or len(chunks) > MAX_VERIFY_GRAPH_REQUESTS:
            return None
        if not all(chunk.samples and chunk.length == 1 + len(chunk.drafts) for chunk in chunks):
            return None
        if num_attention_items([chunk.start + chunk.length for chunk in chunks]) > MAX_VERIFY_ITEMS:
            return None
        return StepSize(self._bucket(len(chunks)), self.max_queries)

    def _bucket(self, num_requests: int) -> int:
        return next(size for size in bucket_sizes(self.max_running_requests) if size >= num_requests)

    def _no_rows(self, size: StepSize) -> torch.Tensor:
        return pack(np.zeros((3, 0), np.int64), [], [], self.page_size, size).to(self.device)

    def _verify_logits(self, size: StepSize, packed: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(logits [R, V], aux [R, A * H], hidden [R, H], slots [R]) of a step that verifies drafts."""
        step = unpack(packed, size)
        tokens, requests, positions = step.rows
        token_ids, kv_slots = self._step_inputs(tokens, requests, positions)
        plans = {
            key: plan_attention(
                step.kv_lens, step.cu_seqlens_q, key.num_kv_heads, MAX_VERIFY_ITEMS, size.rows_per_request, key.window
            )
            for key in self.plan_keys
        }
        pages = self.page_table.index_select(0, step.slots.clamp(min=0))
        part = AttentionPart(size.rows, pages, step.cu_seqlens_q, step.kv_lens, plans, size.rows_per_request)
        context = AttentionContext(self.kv_caches, kv_slots, (part,))
        hidden, aux = self.model.forward_with_aux(token_ids, positions, context, self.aux_layers)
        return self.model.logits(hidden), aux, hidden, requests

    def _decode_logits(self, rows: torch.Tensor, groups: Groups | None) -> tuple[torch.Tensor, ...]:
        """(logits [B, V], aux [B, A * H], hidden [B, H]) of a decode step.

        rows: int64 [3, B], tokens, requests (-1: padding) and positions.
        """
        tokens, requests, positions = rows
        token_ids, kv_slots = self._step_inputs(tokens, requests, positions)
        part = self._decode_part(requests, positions, groups)
        context = AttentionContext(self.kv_caches, kv_slots, (part,))
        hidden, aux = self.model.forward_with_aux(token_ids, positions, context, self.aux_layers)
        return self.model.logits(hidden), aux, hidden

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
            key: plan_attention(
                kv_lens, cu_seqlens_q, key.num_kv_heads, MAX_ATTENTION_ITEMS, window=key.window, groups=groups
            )
            for key in (self.plan_keys if planned else ())
        }
        page_table = self.page_table.index_select(0, requests.clamp(min=0))
        return AttentionPart(len(requests), page_table, cu_seqlens_q, kv_lens, plans, 1 if planned else None)

    def _fits_a_plan(self, rows: np.ndarray) -> bool:
        return num_attention_items(rows[2] + 1) <= MAX_ATTENTION_ITEMS

    def _groups(self, rows: np.ndarray) -> PrefixGroups | None:
        """The groups of a decode step that share a prefix."""
        if not self.group_prefixes:
            return None
        _, slots, positions = rows
        pages = self.host_page_table[slots, : int(positions.max()) // self.page_size + 1]
        return find_groups(pages, positions + 1, self.page_size, KV_TILE, self.group_requests)

    def _order(self, batch: StepBatch) -> tuple[list[Chunk], int]:
        """The chunks in the order of their rows, and how many at its beginning take the attention kernel for decodes.

        On a GPU decodes and prefills take different ones, so each kind's rows lie together; and where all are decodes,
        those that share a prefix.
        """
        chunks = batch.chunks
        if not self.on_gpu:
            return chunks, 0
        if not batch.has_one_token_each:
            chunks = sorted(chunks, key=_is_prefill)
            return chunks, sum([chunk.length == 1 for chunk in chunks])
        if self.group_prefixes:
            order = order_by_prefix(self.host_page_table, [chunk.request.slot for chunk in chunks])
            chunks = [chunks[index] for index in order]
        return chunks, len(chunks)

    def _new_pages(self, chunks: Sequence[Chunk]) -> np.ndarray:
        """int64 [2, N]: places in the page table, as one row, and the pages that the requests have gained there.

        A request's first page is where it begins to run.
        """
        width = self.host_page_table.shape[1]
        places: list[int] = []
        pages: list[int] = []
        for chunk in chunks:
            request = chunk.request
            synced, held = request.num_pages_synced, request.pages
            if synced < len(held):
                if synced == 0:
                    self.sampler.enter(request)
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
        rows: np.ndarray,
        drawing: list[Request],
        drafts: list[Sequence[int]],
        slots: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Draws for each request; the tokens are pending then. Returns tokens and log-probs.

        rows: [3, R] of the R rows of `logits`; slots: their slots, on the device.
        Of several rows of a request, whichever is last in `last_tokens` will not be read: no step follows unseen.
        """
        if logits is None:
            return torch.empty(0, dtype=torch.int64, device="cpu"), torch.empty(0, dtype=torch.float32, device="cpu")
        if self.has_scalar_head:
            return self._values(logits, drawing)
        _, host_slots, positions = rows
        taken = taken_drafts(drafts) if any(drafts) else None
        tokens, logprobs = self.sampler.draw(logits, host_slots, positions + 1, taken)
        if self.model.ranks is not None:
            self.model.ranks.broadcast(tokens)
        self.last_tokens.index_copy_(0, slots, tokens)
        for request in drawing:
            request.num_pending += 1
        return tokens, logprobs

    def _values(self, values: torch.Tensor, drawing: list[Request]) -> tuple[torch.Tensor, torch.Tensor]:
        """Like `_draw`, of a model with a scalar head: -1 for a value that is no number, else 0; and the values."""
        values = values.squeeze(1)
        for request in drawing:
            request.num_pending += 1
        return values.isfinite().long() - 1, values

    def _scores(self, hidden: torch.Tensor, chunk: Chunk) -> torch.Tensor:
        """Log-probs of the tokens that follow those of the chunk, from the hidden states of `_num_scored` rows."""
        request = chunk.request
        targets = self._send(np.array(request.tokens[chunk.start + 1 : chunk.start + 1 + len(hidden)], np.int64))
        temperature = torch.full(targets.shape, request.params.temperature, dtype=torch.float32, device=self.device)
        scores = [
            token_log_probs(self.model.logits(states), wanted, temperature[: len(wanted)])
            for states, wanted in zip(
                hidden.split(SCORED_ROWS_AT_ONCE), targets.split(SCORED_ROWS_AT_ONCE), strict=True
            )
        ]
        return torch.cat(scores)

    def _send(self, values: np.ndarray) -> torch.Tensor:
        return to_device(values, self.device)


def _num_finite(values: Sequence[float]) -> int:
    """How many of the values there are before the first that is infinite or no number."""
    return next((index for index, value in enumerate(values) if not math.isfinite(value)), len(values))


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
