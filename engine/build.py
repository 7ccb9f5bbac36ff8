"""What every rank of an engine makes from its EngineConfig: the model with its weights, and the sizes of the rest."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lockstep.engine.checkpoints.checkpoint import check_weights, load_into
from lockstep.engine.memory.kv_memory import MemoryConfig
from lockstep.engine.models.config import ModelConfig
from lockstep.engine.models.decoder import Decoder
from lockstep.engine.models.layers.linear import format_named
from lockstep.engine.models.names import expand, head_matrix_shapes
from lockstep.engine.models.sharding import check_divides, check_expert_ranks, parameter_shards, product_shapes
from lockstep.engine.ranks.rank_group import RankGroup
from lockstep.engine.scheduling.scheduler import SchedulerConfig
from lockstep.engine.steps.runner import RunnerConfig
from lockstep.engine.weights.dummy_weights import initialize_dummy
from lockstep.kernels import numerics

if TYPE_CHECKING:
    from lockstep.engine.config import EngineConfig

PAGE_SIZE = {"cpu": 16, "cuda": 64}
CPU_KV_CACHE_BYTES = 512 * 2**20


def rank_device(config: EngineConfig, rank: int) -> torch.device:
    """Where a rank computes: on the CPU, or on the GPU that is `rank` behind the config's. Raises ValueError."""
    device = numerics.usable_device(config.device)
    if device.type == "cpu" or config.tp_size == 1:
        return device
    first = torch.cuda.current_device() if device.index is None else device.index
    if first + config.tp_size > torch.cuda.device_count():
        raise ValueError(
            f"EngineConfig.tp_size={config.tp_size} takes a GPU per rank from {config.device} on, but there are "
            f"{torch.cuda.device_count()} GPUs"
        )
    return torch.device("cuda", first + rank)


def build_model(
    config: EngineConfig, model_config: ModelConfig, device: torch.device, ranks: RankGroup | None
) -> Decoder:
    """The rank's model with its weights, on a process and device that were seen to keep the row contract."""
    dtype = getattr(torch, config.dtype)
    if config.load_format == "auto":
        check_weights(config.model, model_config)
    numerics.set_up(device)
    model = Decoder(
        model_config,
        device,
        dtype,
        config.row_parallel_splits,
        ranks,
        config.ep_size > 1,
        format_named(config.linear_format, "EngineConfig.linear_format", config.tp_size),
    )
    shapes = product_shapes(model_config, model.shard, config.row_parallel_splits)
    numerics.check_row_contract(device, dtype, shapes, head_matrix_shapes(model.local_config))
    if model_config.head == "scalar":
        numerics.check_row_contract(device, torch.float32, {(1, model_config.hidden_size)})
    if ranks is not None:
        split = [entry for entry in expand(model_config) if len(entry.shape) == 2 and entry.shard_dim is not None]
        numerics.check_split_contract(device, dtype, {(e.shape, e.shard_dim) for e in split}, ranks.size)
    if config.load_format == "dummy":
        initialize_dummy(model, config.seed, parameter_shards(model_config, model.shard))
    else:
        load_into(model, config.model)
    return model


def check_parallel(config: EngineConfig, model_config: ModelConfig) -> None:
    """Raises ValueError that names what the ranks cannot share out."""
    try:
        check_divides(model_config, config.tp_size, config.row_parallel_splits)
        check_expert_ranks(model_config, "ep_size", config.ep_size, "tp_size", config.tp_size)
        format_named(config.linear_format, "linear_format", config.tp_size)
    except ValueError as error:
        raise ValueError(f"EngineConfig: {error}") from None


def scheduler_config(config: EngineConfig, model_config: ModelConfig) -> SchedulerConfig:
    longest = config.max_model_len or model_config.max_position_embeddings
    if longest > model_config.max_position_embeddings:
        raise ValueError(
            f"EngineConfig.max_model_len={longest} is beyond the model's max_position_embeddings="
            f"{model_config.max_position_embeddings}"
        )
    return SchedulerConfig(
        max_running_requests=config.max_running_requests,
        max_prefill_tokens=config.max_prefill_tokens,
        max_model_len=longest,
        num_chain_tokens=config.num_draft_tokens if config.has_draft_model else 0,
    )


def page_size(config: EngineConfig) -> int:
    return config.page_size or PAGE_SIZE[torch.device(config.device).type]


def num_kv_pages(
    config: EngineConfig,
    sizes: SchedulerConfig,
    model: Decoder,
    device: torch.device,
    draft_elements_per_token: int = 0,
) -> int:
    """Pages of KV that this rank has memory for, its weights being there.

    draft_elements_per_token: of a draft model's keys and values, which lie in the same pages.
    """
    local, page_tokens = model.local_config, page_size(config)
    itemsize = getattr(torch, config.dtype).itemsize
    page_bytes = (local.kv_elements_per_token + draft_elements_per_token) * page_tokens * itemsize
    if config.kv_cache_tokens is not None:
        if config.kv_cache_tokens < page_tokens:
            raise ValueError(f"kv_cache_tokens={config.kv_cache_tokens} is less than a page of {page_tokens}")
        return config.kv_cache_tokens // page_tokens
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * config.memory_fraction) // page_bytes
    useful = config.max_running_requests * -(-sizes.max_model_len // page_tokens)
    return max(1, min(useful, CPU_KV_CACHE_BYTES // page_bytes))


def memory_config(config: EngineConfig, num_pages: int) -> MemoryConfig:
    """num_pages: those that every rank has."""
    return MemoryConfig(num_pages, page_size(config), config.enable_prefix_cache)


def runner_config(
    config: EngineConfig, sizes: SchedulerConfig, memory: MemoryConfig, device: torch.device
) -> RunnerConfig:
    """What every rank's runner has in common, and its device."""
    return RunnerConfig(
        max_running_requests=sizes.max_running_requests,
        max_model_len=sizes.max_model_len,
        page_size=memory.page_size,
        num_pages=memory.num_pages,
        num_draft_tokens=config.num_draft_tokens,
        device=device,
        dtype=getattr(torch, config.dtype),
        cuda_graphs=config.cuda_graphs,
        group_prefixes=config.group_prefixes,
    )
