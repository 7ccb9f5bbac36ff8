"""What an engine is made of, built from its config."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from lockstep.engine.build import (
    build_model,
    check_parallel,
    memory_config,
    num_kv_pages,
    rank_device,
    runner_config,
    scheduler_config,
)
from lockstep.engine.config import EngineConfig
from lockstep.engine.memory.kv_memory import KVMemory
from lockstep.engine.models.config import ModelConfig
from lockstep.engine.models.decoder import Decoder
from lockstep.engine.models.layers.linear import encode, encoded
from lockstep.engine.ranks.no_workers import NoWorkers
from lockstep.engine.ranks.rank_weights import WeightsOverRanks
from lockstep.engine.ranks.tensor_parallel import LeadingRunner, start_workers
from lockstep.engine.ranks.workers import Workers
from lockstep.engine.scheduling.scheduler import Scheduler
from lockstep.engine.speculation.build import load_draft_model, new_eagle, new_speculation
from lockstep.engine.speculation.eagle import EagleDrafter
from lockstep.engine.speculation.no_draft import NoDraftModel
from lockstep.engine.speculation.speculation import NoSpeculation, Speculation
from lockstep.engine.steps.runner import Runner
from lockstep.engine.weights.served_weights import OwnWeights, ServedWeights


@dataclass
class EngineParts:
    """workers: the other ranks. The rest is rank 0's."""

    workers: Workers | NoWorkers
    model: Decoder
    weights: ServedWeights
    memory: KVMemory
    scheduler: Scheduler
    runner: Runner
    draft: EagleDrafter | NoDraftModel
    speculation: Speculation | NoSpeculation


def build_parts(config: EngineConfig, model_config: ModelConfig) -> EngineParts:
    """Reads the weights, on all ranks, and takes the memory. Raises ValueError for what the config cannot have."""
    check_parallel(config, model_config)
    device = rank_device(config, 0)
    sizes = scheduler_config(config, model_config)
    workers = start_workers(config, model_config) if config.tp_size > 1 else NoWorkers()
    try:
        model = build_model(config, model_config, device, workers.group)
        draft = load_draft_model(config, model)
        num_pages = num_kv_pages(config, sizes, model, device, draft.config.kv_elements if draft else 0)
        with workers.watched():
            num_pages = workers.meet(num_pages)
    except BaseException:
        workers.shutdown()
        raise
    memory = memory_config(config, num_pages)
    eagle = new_eagle(config, draft, memory, sizes.max_model_len)
    new_runner = Runner if config.tp_size == 1 else partial(LeadingRunner, workers)
    runner = new_runner(model, runner_config(config, sizes, memory, device), eagle)
    kv_memory = KVMemory(memory)
    return EngineParts(
        workers=workers,
        model=model,
        weights=_new_weights(config, model_config, model, workers, device),
        memory=kv_memory,
        scheduler=Scheduler(sizes, kv_memory),
        runner=runner,
        draft=eagle or NoDraftModel(config.draft_model),
        speculation=new_speculation(config, eagle, model_config.vocab_size),
    )


def _new_weights(
    config: EngineConfig, model_config: ModelConfig, model: Decoder, workers: Workers | NoWorkers, device: torch.device
) -> ServedWeights:
    targets = dict(model.named_parameters())
    if config.tp_size == 1:
        places = encoded(model)
        encoders = {name: partial(encode, name, place) for name, place in places.items()}
        wholes = {n: torch.empty(place.shape, dtype=place.dtype, device="meta") for n, place in places.items()}
        return OwnWeights(targets, encoders, wholes)
    return WeightsOverRanks(workers, model_config, targets, config.ep_size, device)
