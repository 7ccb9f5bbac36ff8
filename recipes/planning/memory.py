"""How many bytes a trainer's rank and an engine's rank take: exact for weights, optimizer and KV, else an estimate."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch

from lockstep.engine import EngineConfig
from lockstep.engine.build import CPU_KV_CACHE_BYTES
from lockstep.engine.models.config import ModelConfig
from lockstep.engine.models.layers.attention import GroupedAttention
from lockstep.engine.models.layers.mlp import GatedMLP
from lockstep.engine.models.layers.shard import Shard
from lockstep.engine.models.names import expand
from lockstep.engine.models.sharding import parameter_shards, shard_config
from lockstep.trainer_bridge import TrainerConfig
from lockstep.trainer_bridge.megatron.layout import check_sizes, local_layout

OPTIMIZER, ACTIVATIONS = "optimizer", "activations"  # names of items


@dataclass(frozen=True)
class Item:
    """A part of a rank's memory. how: the arithmetic, for people."""

    name: str
    num_bytes: int
    how: str


def num_parameters(model: ModelConfig) -> int:
    return sum(entry.num_elements for entry in expand(model))


def trainer_memory(
    model: ModelConfig, config: TrainerConfig, num_ranks: int, most_tokens: int | None = None
) -> list[Item]:
    """Of the rank that takes the most, in a world of num_ranks. Raises ValueError for sizes that the model refuses.

    most_tokens: that an update has, where these are fewer than a micro-batch takes.
    """
    sizes = config.parallel_sizes(num_ranks)
    check_sizes(sizes, model)
    layouts = [local_layout(model, sizes, rank) for rank in range(num_ranks)]
    held = max(sum(prod(parameter.shard.local_shape) for parameter in layout) for layout in layouts)
    size = getattr(torch, config.dtype).itemsize
    half = size < 4
    items = [Item("weights", held * size, f"{held:,} parameters x {size} bytes")]
    # fp32 sums, and beside them the gradients of the backward pass at work where those are in another type.
    gradient_bytes = 4 + (size if half else 0)
    items.append(Item("gradients", held * gradient_bytes, f"{gradient_bytes} bytes each: fp32 sums" + half * ", bf16"))
    if config.optimizer == "adamw":
        masters = half or sizes.data > 1
        share = held // sizes.data
        how = f"{'fp32 master and ' if masters else ''}two fp32 moments each"
        shared_out = f", over {sizes.data} data-parallel ranks" if sizes.data > 1 else ""
        items.append(Item(OPTIMIZER, share * (12 if masters else 8), how + shared_out))
    if activations := _activations(model, config, most_tokens):
        items.append(activations)
    return items


def engine_memory(model: ModelConfig, config: EngineConfig, *, is_remote: bool) -> list[Item]:
    """Of one rank. is_remote: the trainer is another process, so an update arrives beside the weights that serve on."""
    size = getattr(torch, config.dtype).itemsize
    shards = parameter_shards(model, Shard(0, config.tp_size))
    held = sum(prod(shard.local_shape) for shard in shards)
    items = [Item("weights", held * size, f"{held:,} parameters x {size} bytes")]
    if is_remote:
        items.append(Item("room for an update", held * size, "new weights arrive beside those that serve"))
    per_token = kv_bytes_per_token(model, config)
    if config.kv_cache_tokens is None and config.device == "cpu":
        longest = config.max_model_len or model.max_position_embeddings
        most = min(CPU_KV_CACHE_BYTES, config.max_running_requests * longest * per_token)
        items.append(Item("KV cache", most, f"at most {CPU_KV_CACHE_BYTES >> 20} MiB on a CPU"))
    if config.kv_cache_tokens is not None:
        how = f"{config.kv_cache_tokens:,} tokens x {per_token:,} bytes"
        items.append(Item("KV cache", config.kv_cache_tokens * per_token, how))
    return items


def kv_bytes_per_token(model: ModelConfig, config: EngineConfig) -> int:
    """Of one rank, which holds its share of the KV heads."""
    local = shard_config(model, Shard(0, config.tp_size))
    return local.kv_elements_per_token * getattr(torch, config.dtype).itemsize


def _activations(model: ModelConfig, config: TrainerConfig, most_tokens: int | None) -> Item | None:
    """What a micro-batch keeps for its backward pass; None for layers with experts or latent attention.

    A layer keeps the inputs of its two norms and three of its products' (hidden), qkv, the rotated queries, keys and
    values, the attention's output, and the two halves of the MLP; the head keeps its input and the logits.
    """
    layer, tensor = model.layers[0], config.tensor_parallel_size
    if any(type(one.mixer) is not GroupedAttention or type(one.mlp) is not GatedMLP for one in model.layers):
        return None
    parts = 3 * layer.mixer.query_size + 4 * layer.mixer.kv_size + 2 * layer.mlp.ffn_hidden_size
    in_layer = 5 * model.hidden_size + parts // tensor
    layers = -(-model.num_layers // config.pipeline_parallel_size)
    per_token = in_layer + layers * model.hidden_size if config.recompute else layers * in_layer
    per_token += model.hidden_size + model.vocab_size
    in_flight = config.pipeline_parallel_size  # 1F1B: the first stage has so many micro-batches at once
    tokens, size = config.max_tokens_per_micro_batch, getattr(torch, config.dtype).itemsize
    tokens = min(tokens, most_tokens or tokens)
    recompute = ", recomputed layer by layer" if config.recompute else ""
    how = f"estimate: {tokens:,} tokens x {per_token * size:,} bytes" + (f" x {in_flight}" if in_flight > 1 else "")
    return Item(ACTIVATIONS, tokens * per_token * size * in_flight, how + recompute)
