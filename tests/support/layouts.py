"""Tensor-parallel layouts of a model's parameters, and a rank's tensors of them."""

import torch

from lockstep.engine.models.config import ModelConfig
from lockstep.engine.models.names import Entry, expand
from lockstep.trainer_bridge.weight_plan import Piece, Shard, slices, whole


def tensor_parallel_layout(config: ModelConfig, size: int) -> dict[int, list[Shard]]:
    return {rank: [_shard(entry, rank, size) for entry in expand(config)] for rank in range(size)}


def _shard(entry: Entry, rank: int, size: int) -> Shard:
    if entry.shard_dim is None or size == 1:
        return whole(entry.megatron, entry.shape)
    halves = 2 if entry.kind == "gate_up" else 1
    width = entry.shape[entry.shard_dim] // halves // size
    pieces = []
    for half in range(halves):
        starts = (half * size * width + rank * width, half * width)
        boxes = [
            tuple((s, s + width) if d == entry.shard_dim else (0, n) for d, n in enumerate(entry.shape)) for s in starts
        ]
        pieces.append(Piece(*boxes))
    local = tuple(halves * width if d == entry.shard_dim else n for d, n in enumerate(entry.shape))
    return Shard(entry.megatron, entry.shape, local, tuple(pieces))


def local_tensors(shards: list[Shard], values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What a rank with these shards holds of whole parameters."""
    tensors = {}
    for shard in shards:
        tensors[shard.name] = torch.empty(shard.local_shape, dtype=values[shard.name].dtype)
        for piece in shard.pieces:
            tensors[shard.name][slices(piece.local)] = values[shard.name][slices(piece.whole)]
    return tensors
