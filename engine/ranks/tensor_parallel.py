"""An engine's part on rank 0 and on the others, where its model is split over several."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from lockstep.engine.build import build_model, memory_config, num_kv_pages, rank_device, runner_config, scheduler_config
from lockstep.engine.models.config import ModelConfig
from lockstep.engine.models.decoder import Decoder
from lockstep.engine.ranks.rank_group import RankGroup
from lockstep.engine.ranks.rank_weights import RankWeights
from lockstep.engine.ranks.workers import Workers
from lockstep.engine.scheduling.step_batch import StepBatch
from lockstep.engine.steps.rank_step import RankStep
from lockstep.engine.steps.results import Collected, LaunchedStep
from lockstep.engine.steps.runner import Runner, RunnerConfig

if TYPE_CHECKING:
    from lockstep.engine.config import EngineConfig


def start_workers(config: EngineConfig, model_config: ModelConfig) -> Workers:
    """Ranks 1 .. tp_size - 1 begin to read their weights."""
    return Workers(
        config.tp_size,
        rank_device(config, 0),
        config.rank_timeout_s,
        config.rank_start_timeout_s,
        EngineFollower,
        config,
        model_config,
    )


class LeadingRunner(Runner):
    """Rank 0's: the other ranks take part in its steps."""

    def __init__(self, workers: Workers, model: Decoder, config: RunnerConfig, drafter: None = None) -> None:
        super().__init__(model, config, drafter, announce=workers.step)
        self.workers = workers

    def launch(self, batch: StepBatch, weight_version: int, drafts_next: bool = False) -> LaunchedStep:
        with self.workers.watched():
            return super().launch(batch, weight_version, drafts_next)

    def collect(self, step: LaunchedStep) -> Collected:
        if step.ready is not None:
            with self.workers.watched():
                self.workers.wait_for(step.ready)
        return super().collect(step)


class EngineFollower:
    """Another rank's: its part of the model, of the KV cache and of each step. See workers.Follower."""

    def __init__(self, ranks: RankGroup, config: EngineConfig, model_config: ModelConfig) -> None:
        self.device = rank_device(config, ranks.rank)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        self.config = config
        self.model = build_model(config, model_config, self.device, ranks)
        self.sizes = scheduler_config(config, model_config)
        self.num_pages = num_kv_pages(config, self.sizes, self.model, self.device)
        self.weights = RankWeights(model_config, ranks, dict(self.model.named_parameters()), config.ep_size)

    def begin(self, num_pages: int) -> None:
        memory = memory_config(self.config, num_pages)
        self.runner = Runner(self.model, runner_config(self.config, self.sizes, memory, self.device))

    def step(self, step: RankStep) -> None:
        self.runner.follow(step)

    def stage(self, indices: Sequence[int]) -> None:
        self.weights.stage(indices)
        self.weights.hashes(of_staged=True)

    def flip(self) -> None:
        self.weights.flip()

    def hash(self) -> None:
        self.weights.hashes(of_staged=False)

    def discard(self) -> None:
        self.weights.discard()

    def sleep(self) -> None:
        self.runner.free_kv_cache()

    def wake(self) -> None:
        self.runner.take_kv_cache()
