"""Which part of which parameter each rank of a trainer holds, and whole parameters put together from the parts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from lockstep.engine.models.config import ModelConfig
from lockstep.engine.models.layers.shard import Shard
from lockstep.engine.models.names import expand
from lockstep.engine.models.sharding import ParameterShard, check_expert_ranks, parameter_shards, row_widths
from lockstep.engine.ranks.rank_sum import all_gather
from lockstep.trainer_bridge.config import ParallelSizes
from lockstep.trainer_bridge.weight_plan import Layout

if TYPE_CHECKING:
    from lockstep.trainer_bridge.megatron.parallel import Ranks

_LAYERS = "decoder.layers."


@dataclass(frozen=True)
class LocalParameter:
    """A rank's part of one parameter.

    shard: under Megatron's name in the whole model, with layers numbered over all stages; what `named_weights` yields.
    module_name: the parameter's name in the module of model chunk `chunk`, where layers are numbered from 0.
    """

    shard: ParameterShard
    module_name: str
    chunk: int

    @property
    def name(self) -> str:
        return self.shard.name


def shard_of(sizes: ParallelSizes, tensor_rank: int) -> Shard:
    """What a tensor-parallel rank holds."""
    return Shard(tensor_rank, sizes.tensor, sizes.expert)


def check_sizes(sizes: ParallelSizes, model: ModelConfig) -> None:
    """Raises ValueError that names a size that the model does not allow, and what it does not divide."""
    stages = "pipeline_parallel_size * virtual_pipeline_parallel_size = {} does not divide the {} layers"
    divisions = [
        (sizes.tensor, sizes.row_parallel_splits, "tensor_parallel_size {} does not divide row_parallel_splits {}"),
        (sizes.data, sizes.gradient_splits, "data-parallel size {} does not divide gradient_splits {}"),
        (sizes.tensor, model.vocab_size, "tensor_parallel_size {} does not divide the vocabulary of {} tokens"),
        (sizes.num_stages, model.num_layers, stages),
    ]
    for name, number in sorted({layer.mixer.heads for layer in model.layers}):
        divisions.append((sizes.tensor, number, f"tensor_parallel_size {{}} does not divide {name} = {{}}"))
    for name, width in sorted(row_widths(model)):
        divisions.append((sizes.row_parallel_splits, width, f"row_parallel_splits {{}} does not divide {name} = {{}}"))
    for divisor, number, message in divisions:
        if number % divisor:
            raise ValueError(message.format(divisor, number))
    check_expert_ranks(model, "expert_parallel_size", sizes.expert, "tensor_parallel_size", sizes.tensor)


def local_layout(model: ModelConfig, sizes: ParallelSizes, rank: int) -> list[LocalParameter]:
    """What the rank number `rank` of a trainer of these sizes holds, in the order of `names.expand`.

    A pure function, so any process can know the layout of all ranks. Data-parallel ranks hold the same. The copy of a
    tied embedding that the last pipeline stage keeps for its logits is not listed: no weight leaves a trainer there.
    """
    tensor_rank, _, pipeline_rank = sizes.coordinates(rank)
    held = []
    for shard in parameter_shards(model, shard_of(sizes, tensor_rank)):
        stage = _stage(shard.name, model, sizes)
        if stage % sizes.pipeline == pipeline_rank:
            first_layer = stage * (model.num_layers // sizes.num_stages)
            held.append(LocalParameter(shard, _module_name(shard.name, first_layer), stage // sizes.pipeline))
    return held


def trainer_layout(model: ModelConfig, sizes: ParallelSizes) -> Layout:
    """What every rank of a trainer of these sizes holds, for a weight plan. Raises ValueError for impossible sizes."""
    check_sizes(sizes, model)
    return {
        rank: [held.shard for held in local_layout(model, sizes, rank)]
        for rank in range(sizes.tensor * sizes.data * sizes.pipeline)
    }


def local_parts(
    layout: Sequence[LocalParameter], whole: Iterable[tuple[str, torch.Tensor]]
) -> Iterator[tuple[LocalParameter, torch.Tensor]]:
    """Of whole parameters by name, those of the layout, each with the rank's part of it (new, or the whole itself)."""
    held = {parameter.name: parameter for parameter in layout}
    for name, tensor in whole:
        if name in held:
            shard = held[name].shard
            part = tensor
            if shard.is_split:
                part = tensor.new_empty(shard.local_shape)
                shard.copy_from_whole(part, tensor)
            yield held[name], part


def whole_tensors(
    model: ModelConfig,
    ranks: Ranks,
    local: Callable[[LocalParameter], torch.Tensor],
    dtype: torch.dtype,
    device: torch.device,
) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, whole tensor) of every parameter, on every rank, put together from what `local` gives of each rank's part.

    local: this rank's tensor of its part's shape, of this dtype (fp32 where the table says so) and on this device. One
    whole tensor exists at a time; it may be the one that `local` gave, so it is not to be written. All ranks must take
    all of them: each is sent by all.
    """
    sizes = ranks.sizes
    fp32 = {entry.megatron for entry in expand(model) if entry.fp32}
    own = {parameter.name: parameter for parameter in local_layout(model, sizes, dist.get_rank())}
    for shards in zip(*(parameter_shards(model, shard_of(sizes, rank)) for rank in range(sizes.tensor)), strict=True):
        name, shape = shards[0].name, shards[0].whole_shape
        if name in own:
            whole = _gather(local(own[name]), shards, ranks)
        else:
            whole = torch.empty(shape, dtype=torch.float32 if name in fp32 else dtype, device=device)
        if ranks.pipeline.group is not None:
            owner = ranks.pipeline.global_rank(_stage(name, model, sizes) % sizes.pipeline)
            dist.broadcast(whole, src=owner, group=ranks.pipeline.group)
        yield name, whole


def _gather(local: torch.Tensor, shards: Sequence[ParameterShard], ranks: Ranks) -> torch.Tensor:
    """The whole parameter from the parts of the tensor-parallel ranks."""
    if not shards[0].is_split:
        return local
    whole = torch.empty(shards[0].whole_shape, dtype=local.dtype, device=local.device)
    for shard, part in zip(shards, all_gather(local, ranks.tensor.group), strict=True):
        shard.copy_to_whole(whole, part)
    return whole


def _stage(name: str, model: ModelConfig, sizes: ParallelSizes) -> int:
    if name.startswith(_LAYERS):
        layer = int(name.removeprefix(_LAYERS).split(".", 1)[0])
        return layer // (model.num_layers // sizes.num_stages)
    return 0 if name.startswith("embedding.") else sizes.num_stages - 1


def _module_name(name: str, first_layer: int) -> str:
    if not name.startswith(_LAYERS):
        return name
    layer, rest = name.removeprefix(_LAYERS).split(".", 1)
    return f"{_LAYERS}{int(layer) - first_layer}.{rest}"
