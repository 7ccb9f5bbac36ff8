"""Which part of which parameter each rank of a trainer holds, and whole parameters put together from the parts."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from lockstep.engine.models.config import ModelConfig
from lockstep.engine.models.names import Entry, expand
from lockstep.engine.rank_sum import all_gather
from lockstep.trainer_bridge.parallel import ParallelSizes, Ranks
from lockstep.trainer_bridge.weight_plan import Layout, Piece, Shard

_LAYERS = "decoder.layers."

# Per dimension, (start, stop).
Extent = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class LocalParameter:
    """A rank's part of one parameter.

    name: Megatron's name in the whole model, with layers numbered over all stages; what `named_weights` yields.
    module_name: the parameter's name in the module of model chunk `chunk`, where layers are numbered from 0.
    shape, local_shape: of the whole parameter and of the rank's tensor.
    pieces: (extent in the rank's tensor, extent in the whole one) of each box that it holds. They are disjoint and
        cover the rank's tensor. linear_fc1 has two under tensor parallelism, its gates and its ups; linear_qkv, whose
        rows are ordered by query group, has one, as has any other parameter.
    shard_dim: the dimension that tensor parallelism cuts; None where each tensor-parallel rank holds the whole.
    """

    name: str
    module_name: str
    chunk: int
    shape: tuple[int, ...]
    local_shape: tuple[int, ...]
    pieces: tuple[tuple[Extent, Extent], ...]
    shard_dim: int | None

    def take(self, whole: torch.Tensor) -> torch.Tensor:
        """The rank's part of the whole parameter; a view where it is one piece."""
        parts = [whole[_slices(extent)] for _, extent in self.pieces]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def put(self, local: torch.Tensor, whole: torch.Tensor) -> None:
        """Writes the rank's part into the whole parameter."""
        for own, extent in self.pieces:
            whole[_slices(extent)] = local[_slices(own)]


def local_layout(model: ModelConfig, sizes: ParallelSizes, rank: int) -> list[LocalParameter]:
    """What the rank number `rank` of a trainer of these sizes holds, in the order of `names.expand`.

    A pure function, so any process can know the layout of all ranks. Data-parallel ranks hold the same. The copy of a
    tied embedding that the last pipeline stage keeps for its logits is not listed: no weight leaves a trainer there.
    """
    tensor_rank, _, pipeline_rank = sizes.coordinates(rank)
    held = []
    for entry in expand(model):
        stage = _stage(entry, model, sizes)
        if stage % sizes.pipeline == pipeline_rank:
            held.append(_local_parameter(entry, stage, model, sizes, tensor_rank))
    return held


def trainer_layout(model: ModelConfig, sizes: ParallelSizes) -> Layout:
    """What every rank of a trainer of these sizes holds, for a weight plan. Raises ValueError for impossible sizes."""
    sizes.check(model)
    return {
        rank: [
            Shard(held.name, held.shape, held.local_shape, tuple(Piece(whole, own) for own, whole in held.pieces))
            for held in local_layout(model, sizes, rank)
        ]
        for rank in range(sizes.tensor * sizes.data * sizes.pipeline)
    }


def local_parts(
    layout: Sequence[LocalParameter], whole: Iterable[tuple[str, torch.Tensor]]
) -> Iterator[tuple[LocalParameter, torch.Tensor]]:
    """Of whole parameters by name, those of the layout, each with the rank's part of it."""
    held = {parameter.name: parameter for parameter in layout}
    for name, tensor in whole:
        if name in held:
            yield held[name], held[name].take(tensor)


def whole_tensors(
    model: ModelConfig,
    ranks: Ranks,
    local: Callable[[LocalParameter], torch.Tensor],
    dtype: torch.dtype,
    device: torch.device,
) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, whole tensor) of every parameter, on every rank, put together from what `local` gives of each rank's part.

    local: this rank's tensor of local_shape, of this dtype and on this device. One whole tensor exists at a time; it
    may be the one that `local` gave, so it is not to be written. All ranks must take all of them: each is sent by all.
    """
    sizes = ranks.sizes
    own = {parameter.name: parameter for parameter in local_layout(model, sizes, dist.get_rank())}
    for entry in expand(model):
        stage = _stage(entry, model, sizes)
        if entry.megatron in own:
            whole = _gather(local(own[entry.megatron]), entry, stage, model, ranks)
        else:
            whole = torch.empty(entry.shape, dtype=dtype, device=device)
        if ranks.pipeline.group is not None:
            owner = ranks.pipeline.global_rank(stage % sizes.pipeline)
            dist.broadcast(whole, src=owner, group=ranks.pipeline.group)
        yield entry.megatron, whole


def _gather(local: torch.Tensor, entry: Entry, stage: int, model: ModelConfig, ranks: Ranks) -> torch.Tensor:
    """The whole parameter from the parts of the tensor-parallel ranks."""
    if ranks.tensor.group is None or entry.shard_dim is None:
        return local
    whole = torch.empty(entry.shape, dtype=local.dtype, device=local.device)
    for tensor_rank, part in enumerate(all_gather(local, ranks.tensor.group)):
        _local_parameter(entry, stage, model, ranks.sizes, tensor_rank).put(part, whole)
    return whole


def _stage(entry: Entry, model: ModelConfig, sizes: ParallelSizes) -> int:
    if entry.megatron.startswith(_LAYERS):
        layer = int(entry.megatron.removeprefix(_LAYERS).split(".", 1)[0])
        return layer // (model.num_layers // sizes.num_stages)
    return 0 if entry.megatron.startswith("embedding.") else sizes.num_stages - 1


def _local_parameter(
    entry: Entry, stage: int, model: ModelConfig, sizes: ParallelSizes, tensor_rank: int
) -> LocalParameter:
    pieces, local_shape = _cut(entry, sizes.tensor, tensor_rank)
    return LocalParameter(
        name=entry.megatron,
        module_name=_module_name(entry.megatron, stage * (model.num_layers // sizes.num_stages)),
        chunk=stage // sizes.pipeline,
        shape=entry.shape,
        local_shape=local_shape,
        pieces=pieces,
        shard_dim=entry.shard_dim,
    )


def _module_name(name: str, first_layer: int) -> str:
    if not name.startswith(_LAYERS):
        return name
    layer, rest = name.removeprefix(_LAYERS).split(".", 1)
    return f"{_LAYERS}{int(layer) - first_layer}.{rest}"


def _cut(entry: Entry, num_ranks: int, rank: int) -> tuple[tuple[tuple[Extent, Extent], ...], tuple[int, ...]]:
    """(pieces, local_shape) of a tensor-parallel rank.

    Query groups and heads are never cut: rows are in the order of groups, whose number the ranks divide
    (ParallelSizes.check).
    """
    whole = tuple((0, size) for size in entry.shape)
    if entry.shard_dim is None or num_ranks == 1:
        return ((whole, whole),), entry.shape
    dim, num_blocks = entry.shard_dim, 2 if entry.kind == "gate_up" else 1
    block = entry.shape[dim] // num_blocks
    part = block // num_ranks
    pieces = tuple(
        (
            _replaced(whole, dim, (b * part, (b + 1) * part)),
            _replaced(whole, dim, (b * block + rank * part, b * block + (rank + 1) * part)),
        )
        for b in range(num_blocks)
    )
    local_shape = tuple(num_blocks * part if d == dim else size for d, size in enumerate(entry.shape))
    return pieces, local_shape


def _replaced(extent: Extent, dim: int, bounds: tuple[int, int]) -> Extent:
    return tuple(bounds if d == dim else kept for d, kept in enumerate(extent))


def _slices(extent: Extent) -> tuple[slice, ...]:
    return tuple(slice(start, stop) for start, stop in extent)
