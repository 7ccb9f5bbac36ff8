"""Runs one step's batch through the model: token ids in, sampled tokens and log-probs out."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lockstep.engine.models.decoder import Decoder
from lockstep.engine.models.layers.context import PlanKey
from lockstep.engine.scheduling.step_batch import Chunk, StepBatch
from lockstep.engine.speculation.eagle import EagleDrafter
from lockstep.engine.steps.attention_parts import AttentionParts
from lockstep.engine.steps.draft_steps import DraftSteps, NoDraft
from lockstep.engine.steps.eager_steps import EagerSteps
from lockstep.engine.steps.graph_steps import GraphSteps, NoGraphSteps
from lockstep.engine.steps.layout import StepLayout, lay_out, order_chunks
from lockstep.engine.steps.packed_rows import RowPacker
from lockstep.engine.steps.page_table import PageTable
from lockstep.engine.steps.rank_step import RankStep
from lockstep.engine.steps.results import Collected, LaunchedStep, collect, launched
from lockstep.engine.steps.sampler import RewardReader, Sampler
from lockstep.engine.steps.scores import Scorer
from lockstep.engine.steps.target import Target
from lockstep.engine.steps.transfer import to_device
from lockstep.kernels.attention.attention_plan import GROUP_ROWS
from lockstep.kernels.memory.copy_pages import copy_pages

# Is given each step's chunks, whose rows lie end to end in: hidden states [T, H], aux states [T, A * H].
Observer = Callable[[Sequence[Chunk], torch.Tensor, torch.Tensor], None]


@dataclass(frozen=True)
class RunnerConfig:
    """Sizes of the arrays and caches of a runner, and where they are. See EngineConfig, and MemoryConfig for pages."""

    max_running_requests: int
    max_model_len: int
    page_size: int
    num_pages: int
    num_draft_tokens: int
    device: torch.device
    dtype: torch.dtype
    cuda_graphs: bool
    group_prefixes: bool


class Runner:
    """Owns the KV cache and the page table, and turns a `StepBatch` into tensors for the model.

    On a GPU nothing here waits for the device but `collect`: inputs go over in asynchronous copies, sampled tokens stay
    in `Target.last_tokens` for the step after, and a pure decode step is one graph.

    With a model over several ranks each has a runner: rank 0's tells the others of a step by `announce` before it
    takes part itself, and theirs follow. These steps are launched eagerly: NCCL's collectives are not put in graphs.
    """

    def __init__(
        self,
        model: Decoder,
        config: RunnerConfig,
        drafter: EagleDrafter | None = None,
        announce: Callable[[RankStep], None] | None = None,
    ):
        self.device = config.device
        self.page_table = PageTable(config.max_running_requests, config.max_model_len, config.page_size, config.device)
        self.target = Target(model, self.page_table, config.num_pages, config.dtype, config.device)
        packer = RowPacker(config.page_size, drafter is not None, config.device)
        self.draft = NoDraft() if drafter is None else DraftSteps(drafter, self.target, packer)
        self.target.aux_layers = self.draft.aux_layers
        plan_keys = model.local_config.plan_keys - {None}
        parts = AttentionParts(self.page_table, plan_keys)
        group_requests = _group_requests(plan_keys) if config.group_prefixes else 0
        has_scalar_head = model.config.head == "scalar"
        self.eager_steps = EagerSteps(self.target, parts, announce or _alone)
        if config.device.type == "cuda" and config.cuda_graphs and model.ranks is None and not has_scalar_head:
            rows_per_request = 1 + config.num_draft_tokens
            self.graph_steps = GraphSteps(self.target, parts, packer, rows_per_request, group_requests)
        else:
            self.graph_steps = NoGraphSteps()
        self.sampler = RewardReader() if has_scalar_head else Sampler(self.target)
        self.scorer = Scorer(self.target)
        self.observer: Observer = _nobody
        # On a GPU decodes and prefills take different kernels of attention; on a CPU they do not.
        self._separates_decodes = config.device.type == "cuda"
        self._groups_prefixes = group_requests > 0
        self.take_kv_cache()

    # Steps -----------------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def launch(self, batch: StepBatch, weight_version: int, drafts_next: bool = False) -> LaunchedStep:
        """Starts the computation of the batch; `collect` gives its requests what they are due.

        drafts_next: and draft tokens for their next step, where there is a draft model.
        """
        layout = self._lay_out(batch)
        computed = self.graph_steps.run(layout) or self.eager_steps.run(layout)
        self.observer(layout.chunks, computed.hidden, computed.aux)
        sampled = self.sampler.run(layout, computed)
        scored = self.scorer.run(layout, computed)
        next_drafts = self.draft.run_after(layout, computed, sampled.tokens, drafts_next)
        return launched(layout, sampled, scored, next_drafts, weight_version, self.device)

    @torch.inference_mode()
    def follow(self, step: RankStep) -> None:
        """Takes part in a step of rank 0: the same calls of the model, in the same order."""
        self.page_table.put(step.new_pages)
        self._copy_pages(step.page_copies)
        computed = self.eager_steps.compute(step)
        self.sampler.follow(computed)
        self.scorer.follow(computed)

    def collect(self, step: LaunchedStep) -> Collected:
        """See `results.collect`."""
        return collect(step)

    def _lay_out(self, batch: StepBatch) -> StepLayout:
        new_pages, started = self.page_table.gained(batch.chunks)
        self.sampler.enter(started)
        self.page_table.put(new_pages)
        page_copies = np.array(batch.page_copies, np.int64).reshape(-1, 2).T
        self._copy_pages(page_copies)
        chunks, num_decodes = batch.chunks, 0
        if self._separates_decodes:
            chunks, num_decodes = order_chunks(batch, self.page_table.on_host if self._groups_prefixes else None)
        return lay_out(batch, chunks, num_decodes, new_pages, page_copies)

    def _copy_pages(self, page_copies: np.ndarray) -> None:
        """Copies pages, int64 [2, N] as `copy_pages` takes them, in the caches of the model and of its draft."""
        if page_copies.size:
            caches = [cache for layer in self.target.kv_caches for cache in layer]
            copy_pages([*caches, *self.draft.kv_caches], to_device(page_copies, self.device))

    # Hidden states -----------------------------------------------------------------------------------------------

    def observe(self, aux_layers: tuple[int, ...], observer: Observer) -> None:
        """From the next step on the observer is given the hidden states of all rows.

        Raises ValueError for other aux layers than those that a draft model reads here.
        """
        if self.draft.aux_layers and aux_layers != self.draft.aux_layers:
            raise ValueError(f"aux_layers={aux_layers}, but the engine's draft model reads {self.draft.aux_layers}")
        self.target.aux_layers, self.target.wants_all_rows, self.observer = aux_layers, True, observer
        self.forget_graphs()

    def stop_observing(self) -> None:
        self.target.aux_layers, self.target.wants_all_rows, self.observer = self.draft.aux_layers, False, _nobody
        self.forget_graphs()

    # Memory ----------------------------------------------------------------------------------------------------------

    def forget_graphs(self) -> None:
        """Graphs are made anew at their next use: the tensors that they read were replaced."""
        self.graph_steps.forget()
        self.draft.forget()

    def take_kv_cache(self) -> None:
        """Memory for the cache, at first and after `free_kv_cache`."""
        self.target.take_kv_cache()
        self.draft.take_kv_cache()
        self.forget_graphs()

    def free_kv_cache(self) -> None:
        """Gives the cache's memory back to the device, until `take_kv_cache`."""
        self.target.free_kv_cache()
        self.draft.free_kv_cache()
        self.forget_graphs()  # they hold memory of their own, and addresses of the old cache
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def _group_requests(plan_keys: Collection[PlanKey]) -> int:
    """How many decodes may read a shared prefix together; 0 where no layer plans its attention, and so none groups."""
    if not plan_keys:
        return 0
    return max(1, GROUP_ROWS // max(key.queries_per_kv_head for key in plan_keys))


def _alone(step: RankStep) -> None:
    """There are no other ranks."""


def _nobody(chunks: Sequence[Chunk], hidden: torch.Tensor, aux: torch.Tensor) -> None:
    """Wants no hidden states."""
